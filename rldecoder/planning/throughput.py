"""How fast a machine computes: what `rldecoder smoke` measured here, or a published peak's share.

A measurement is kept in the per-user cache, one for each model, device and dtype. It is of one
forward pass; stages with small products are slower, on a GPU much, and what is planned from it is
a lower bound of their time.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from rldecoder.config.base import Config
from rldecoder.errors import BadInputError
from rldecoder.files import read_regular, write_bytes
from rldecoder.json_text import parse_json
from rldecoder.lm.smoke import SEQUENCE_TOKENS, SmokeResult
from rldecoder.lm.user_cache import user_cache
from rldecoder.planning.sizes import sizes_of
from rldecoder.schemas import to_json

MEASURED_FILE = "smoke.json"
DEFAULT_SHARE = 0.3
"""Of a published peak: what training and inference of this kind reach where they are done well is
0.3 to 0.5; small products reach less."""


class Peak(NamedTuple):
    """What a device's data sheet says."""

    flops_per_second: float
    """Dense bfloat16 with float32 sums."""
    source: str


PEAKS = {
    "a100": Peak(312e12, "NVIDIA A100 80GB SXM data sheet, 2021"),
    "h100": Peak(989e12, "NVIDIA H100 SXM data sheet, 2023"),
    "h200": Peak(989e12, "NVIDIA H200 SXM data sheet, 2024"),
    "b200": Peak(2250e12, "NVIDIA HGX B200 data sheet, 2025"),
    "l40s": Peak(362e12, "NVIDIA L40S data sheet, 2023"),
    "rtx4090": Peak(165e12, "NVIDIA Ada architecture paper, 2022"),
    "mi300x": Peak(1307e12, "AMD MI300X data sheet, 2023"),
}


class Measured(Config):
    """What a smoke test found."""

    model: str
    device: str
    device_name: str
    dtype: str
    threads: int
    """CPU threads."""
    tokens_per_second: float
    flops_per_second: float
    """Of matrix products, as `planning.sizes` counts them."""
    measured_at: str


class Rate(NamedTuple):
    """The speed that hours are computed from."""

    flops_per_second: float
    said: str
    """Where it comes from, for people."""


def keep(result: SmokeResult, device_name: str, threads: int) -> Measured:
    """Keep a smoke test's throughput for later plans; the newest of a kind stays."""
    flops = sizes_of(result.constants).forward_flops(SEQUENCE_TOKENS)
    new = Measured(
        model=result.model,
        device=result.device,
        device_name=device_name,
        dtype=result.dtype,
        threads=threads,
        tokens_per_second=result.tokens_per_second,
        flops_per_second=flops * result.tokens_per_second,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    kind = (new.model, new.device, new.dtype)
    others = [one for one in measured() if (one.model, one.device, one.dtype) != kind]
    path = _place()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, to_json(path, [one.model_dump(mode="json") for one in [*others, new]]))
    return new


def measured() -> list[Measured]:
    """All that smoke tests kept here; a file that cannot be read counts as none."""
    try:
        return [Measured.model_validate(one) for one in parse_json(read_regular(_place()))]
    except (OSError, ValueError, TypeError, ValidationError):
        return []  # it is measured anew by one command


def rate_for(model: str, device: str | None, share: float | None) -> Rate | None:
    """The speed to plan with; None where nothing was measured here.

    Args:
        model: as the run names it; another model's measurement serves where it has none.
        device: a published device, or None for this machine.
        share: of the published peak that is taken to be reached, 0 to 1.

    Raises:
        BadInputError: no such device, or a share that is none.
    """
    # This machine was measured as it is: there is no peak to take a share of.
    if device is None:
        if share is not None:
            raise BadInputError(
                "--share is of a published peak.",
                "This machine's speed is measured.",
                "Add --device, or leave it out.",
            )
        return _here(model)

    # Of another one only its data sheet is known.
    if device not in PEAKS:
        raise BadInputError(
            f"Nothing is known of the device {device!r}.",
            f"Published peaks: {', '.join(PEAKS)}.",
            "Name one of these, or leave --device out and measure this machine: `rldecoder smoke`.",
        )
    share = DEFAULT_SHARE if share is None else share
    if not 0 < share <= 1:
        raise BadInputError(
            f"--share {share:g} is no share.", "It lies above 0 and is at most 1.", "Take 0.3."
        )

    # The number never stands without the assumption that it rests on.
    peak = PEAKS[device]
    said = (
        f"{share:.0%} of {device}'s {peak.flops_per_second / 1e12:,.0f} TFLOP/s ({peak.source}): "
        "an assumption"
    )
    return Rate(share * peak.flops_per_second, said)


def _here(model: str) -> Rate | None:
    found = measured()
    if not found:
        return None
    # A GPU's, where there is one; this model's own, where it was measured; else the fastest, for
    # small models are slow for their FLOPs, and hours are to be a lower bound.
    best = max(
        found,
        key=lambda one: (
            one.device != "cpu",
            one.model == model,
            one.measured_at if one.model == model else "",
            one.flops_per_second,
        ),
    )
    said = (
        f"{best.flops_per_second / 1e9:,.1f} GFLOP/s by `rldecoder smoke {best.model}` on "
        f"{best.device_name}, {best.threads} threads, {best.measured_at[:10]}"
    )
    if best.model != model:
        said += f" (another model: `rldecoder smoke {model}` measures this one)"
    return Rate(best.flops_per_second, said)


def _place() -> Path:
    return user_cache() / MEASURED_FILE
