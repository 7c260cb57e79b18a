"""The QA report of an SAE: every metric with its formula, the plan's target and the gate's."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from rldecoder.config.sae import GateSaeConfig
from rldecoder.sae.metrics import L0_PERCENTILES, ReconstructionQuality, Usage
from rldecoder.sae.splice import SpliceReport

Entry = dict[str, Any]


class Band(NamedTuple):
    """Values that count as met; an open side is None."""

    low: float | None
    high: float | None
    inclusive: bool = False

    def holds(self, value: float | None) -> bool:
        """Whether a value lies inside; a value that could not be measured does not."""
        if value is None or not math.isfinite(value):
            return False
        if self.inclusive:
            return not (
                (self.low is not None and value < self.low)
                or (self.high is not None and value > self.high)
            )
        return not (
            (self.low is not None and value <= self.low)
            or (self.high is not None and value >= self.high)
        )

    def plain(self) -> float | list[float]:
        """The bound, or both, for JSON."""
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        return bounds[0] if len(bounds) == 1 else bounds

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"below {self.high:g}" if self.low is None else f"above {self.low:g}"


PLAN_TARGETS = {
    "normalised_mse": Band(None, 0.01),
    "explained_variance": Band(0.95, None),
    "splice_kl": Band(None, 0.5),
    "l0_mean": Band(50.0, 100.0, inclusive=True),
    "dead_fraction": Band(None, 0.05),
    "near_duplicate_fraction": Band(None, 0.05),
}
"""Targets of the original plan; shown whatever thresholds the config gates on."""


def thresholds(config: GateSaeConfig) -> dict[str, Band]:
    """What this run's gate demands."""
    return {
        "normalised_mse": Band(None, config.max_normalised_mse),
        "explained_variance": Band(config.min_explained_variance, None),
        "splice_kl": Band(None, config.max_splice_kl),
        "l0_mean": Band(*config.l0_range, inclusive=True),
        "dead_fraction": Band(None, config.max_dead_fraction),
        "near_duplicate_fraction": Band(None, config.max_near_duplicate_fraction),
    }


def make_report(
    quality: ReconstructionQuality,
    usage: Usage,
    near_duplicates: float,
    splice: SpliceReport,
    control: ReconstructionQuality | None,
    config: GateSaeConfig,
) -> dict[str, Entry]:
    """Flat report: name -> value, unit, formula; and for gated metrics target, met (the plan's),
    threshold, passed (this config's).

    Args:
        quality: of the trained SAE on the test split; `control`: of the random one, if measured.
        usage: from the test split's densities.
        near_duplicates: share of decoder rows with a twin.
        splice: with the replacements `sae`, `zero`, `mean`, and `random` if measured.
        config: its thresholds.
    """
    spliced = splice.replaced["sae"]
    report = {
        "normalised_mse": _entry(quality.normalised_mse, "ratio", "sum |x - recon|^2 / sum |x|^2"),
        "explained_variance": _entry(quality.explained_variance, "share", "1 - fvu"),
        "fvu": _entry(quality.fvu, "share", "sum |x - recon|^2 / sum |x - mean(x)|^2"),
        "mse": _entry(quality.mse, "residual units^2", "mean (x - recon)^2 over elements"),
        "cosine": _entry(quality.cosine, "cosine", "mean cos(x - b_dec, recon - b_dec)"),
        "l0_mean": _entry(quality.l0_mean, "latents/token", "mean number of latents above 0"),
        "dead_fraction": _entry(
            quality.dead_fraction, "share", "latents that never fire on the test tokens / all"
        ),
        "near_duplicate_fraction": _entry(
            near_duplicates,
            "share",
            f"latents with another at decoder cosine > {config.near_duplicate_cosine:g} / all",
        ),
        "usage_entropy": _entry(usage.entropy, "nats", "-sum p log p, p = share of all firings"),
        "usage_entropy_normalised": _entry(
            usage.normalised_entropy, "share", "usage_entropy / log(num_latents)"
        ),
        "effective_latents": _entry(usage.effective_latents, "latents", "exp(usage_entropy)"),
        "splice_kl": _entry(spliced.kl, "nats/token", "mean KL(frozen || spliced), positions >= 1"),
        "splice_ce": _entry(spliced.ce, "nats/token", "mean -log p(next token), spliced"),
        "splice_agreement": _entry(
            spliced.agreement, "share", "most likely next token equals the frozen model's"
        ),
        "frozen_ce": _entry(splice.frozen_ce, "nats/token", "the frozen model's on these tokens"),
        "num_tokens": _entry(quality.num_tokens, "tokens", "test tokens reconstructed"),
        "splice_tokens": _entry(splice.num_tokens, "tokens", "test tokens spliced"),
    }
    for percent, value in zip(L0_PERCENTILES, quality.l0_percentiles, strict=True):
        report[f"l0_p{percent}"] = _entry(value, "latents/token", f"{percent}th percentile of L0")
    for ablation in ("zero", "mean"):
        report[f"{ablation}_ablation_ce"] = _entry(
            splice.replaced[ablation].ce, "nats/token", f"residual replaced by {ablation}"
        )
        report[f"ce_recovered_{ablation}"] = _entry(
            splice.ce_recovered("sae", ablation),
            "share",
            f"(CE_{ablation} - CE_splice) / (CE_{ablation} - CE_frozen)",
        )
    if control is not None:
        report |= _control_entries(control, splice)
    for name, threshold in thresholds(config).items():
        value, target = report[name]["value"], PLAN_TARGETS[name]
        report[name] |= {
            "target": target.plain(),
            "met": target.holds(value),
            "threshold": threshold.plain(),
            "passed": threshold.holds(value),
        }
    return report


def failures(report: dict[str, Entry], config: GateSaeConfig) -> tuple[str, ...]:
    """One sentence for each of the config's thresholds that is missed."""
    out = []
    for name, threshold in thresholds(config).items():
        if not report[name]["passed"]:
            value = report[name]["value"]
            text = "could not be measured" if value is None else f"is {value:.4g}"
            out.append(f"SAE {name} {text} on the test split; the gate asks for {threshold}.")
    return tuple(out)


def _control_entries(control: ReconstructionQuality, splice: SpliceReport) -> dict[str, Entry]:
    what = "of a random-init SAE of the same L0, at its best single gain"
    return {
        "random_fvu": _entry(control.fvu, "share", f"fvu {what}"),
        "random_l0_mean": _entry(control.l0_mean, "latents/token", f"L0 {what}"),
        "random_splice_kl": _entry(splice.replaced["random"].kl, "nats/token", f"splice KL {what}"),
        "random_ce_recovered_zero": _entry(
            splice.ce_recovered("random", "zero"), "share", f"CE recovered {what}"
        ),
    }


def _entry(value: float | None, unit: str, formula: str) -> Entry:
    if value is not None and not math.isfinite(value):
        value = None
    return {"value": value, "target": None, "met": None, "unit": unit, "formula": formula}
