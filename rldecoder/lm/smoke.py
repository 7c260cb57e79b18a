"""Smoke test: does the frozen model run here, how fast, in how much memory?"""

from __future__ import annotations

import itertools
import math
import pydoc_data.topics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from rldecoder.errors import NumericalError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.model_sources import fetch, locate
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.lm.random_model import make_random_model
from rldecoder.lm.registry import choose_model
from rldecoder.lm.specs import ArchitectureConstants, check_constants, read_constants
from rldecoder.precision import fast_dtype
from rldecoder.provenance import await_device, peak_memory_bytes

SEQUENCE_TOKENS = 128
"""Tokens a sequence of the test."""


@dataclass(frozen=True)
class SmokeResult:
    """What a pass over `num_tokens` tokens showed."""

    model: str
    source: str
    device: str
    dtype: str
    parameters: int
    load_seconds: float
    """Reading the weights from disk, without any download."""
    num_tokens: int
    tokens_per_second: float
    """Whole body and unembedding, after one warm-up sequence."""
    hidden_shapes: tuple[tuple[int, tuple[int, ...]], ...]
    """(layer, shape [B, T, D]) of every residual stream, 0 = embeddings."""
    hidden_rms: tuple[float, ...]
    """Root mean square of every residual stream, without the first position (a sink)."""
    logits_shape: tuple[int, ...]
    cross_entropy: float
    """Nats per token on the standard library's language reference."""
    peak_memory_bytes: int
    """Of the whole process (CPU) or of the device's allocator (GPU)."""
    constants: ArchitectureConstants
    """What the model's own config says of it."""

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) lines for a table."""
        first, last = self.hidden_shapes[0], self.hidden_shapes[-1]
        shape = " x ".join(map(str, last[1]))
        same = all(found == first[1] for _, found in self.hidden_shapes)
        return [
            ("source", self.source),
            ("device", f"{self.device}, {self.dtype}"),
            ("parameters", f"{self.parameters:,}"),
            ("load", f"{self.load_seconds:.1f} s"),
            ("throughput", f"{self.tokens_per_second:,.0f} tokens/s on {self.num_tokens:,} tokens"),
            (
                f"residuals, layers {first[0]} to {last[0]}",
                f"{shape} each" if same else "shapes differ: " + str(self.hidden_shapes),
            ),
            (
                "residual RMS, first to last",
                f"{self.hidden_rms[0]:.2f} to {self.hidden_rms[-1]:.2f}",
            ),
            ("logits", " x ".join(map(str, self.logits_shape))),
            ("cross-entropy", f"{self.cross_entropy:.3f} nats/token"),
            ("peak memory", f"{self.peak_memory_bytes / 2**30:.2f} GiB"),
        ]


def smoke_test(
    model: str,
    *,
    num_tokens: int = 1024,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> SmokeResult:
    """Run a model on about `num_tokens` tokens of English.

    Args:
        model: a spec's name or file, the path of a Hugging Face folder, or `random`.
        num_tokens: rounded up to whole sequences of 128 tokens.
        device: where to run.
        dtype: of the weights and residuals; None takes bfloat16 where the device is fast with it.
        note: told one line before anything slow starts.

    Raises:
        BadInputError: no such model. NumericalError: NaN or infinity in its residuals.
    """
    with tempfile.TemporaryDirectory() as name:
        if model == "random":
            folder, source, spec = make_random_model(Path(name)), "made on the spot", None
        else:
            is_folder = Path(model).is_dir()
            choice = choose_model("folder", path=model) if is_folder else choose_model(model)
            located = locate(choice.sources)
            folder, source, spec = fetch(located, note), located.description, choice.spec
        started = time.perf_counter()
        wanted = dtype or fast_dtype("bfloat16", device)
        lm = FrozenLM.load(folder, device=device, dtype=wanted)
        load_seconds = time.perf_counter() - started
        parameters = sum(parameter.numel() for parameter in lm.model.parameters())
        if spec is not None:
            check_constants(
                spec, read_constants(lm.model.config, parameters, lm.context_length), str(folder)
            )
        return _measure(lm, model, source, parameters, load_seconds, num_tokens)


@torch.no_grad()
def _measure(
    lm: FrozenLM, model: str, source: str, parameters: int, load_seconds: float, num_tokens: int
) -> SmokeResult:
    # The first pass pays for allocations and for choosing kernels: it is not timed.
    ids = _sample(lm, num_tokens)
    lm.unembed(lm.residuals(ids[:1])[1])
    await_device(lm.device)

    started = time.perf_counter()
    residuals, final = lm.residuals(ids)
    logits = lm.unembed(final)
    await_device(lm.device)
    seconds = time.perf_counter() - started

    for layer, resid in enumerate(residuals):
        if not torch.isfinite(resid).all():
            raise NumericalError(
                f"The residual stream of {model} at layer {layer} holds NaN or infinity.",
                f"The weights are damaged, or {lm.dtype} is too narrow for this model.",
                "Check the weights, or use float32 (`compute_dtype`).",
            )

    cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return SmokeResult(
        model=model,
        source=source,
        device=str(lm.device),
        dtype=str(lm.dtype).removeprefix("torch."),
        parameters=parameters,
        load_seconds=load_seconds,
        num_tokens=ids.numel(),
        tokens_per_second=ids.numel() / seconds,
        hidden_shapes=tuple((layer, tuple(r.shape)) for layer, r in enumerate(residuals)),
        hidden_rms=tuple(r[:, 1:].float().square().mean().sqrt().item() for r in residuals),
        logits_shape=tuple(logits.shape),
        cross_entropy=cross_entropy.item(),
        peak_memory_bytes=peak_memory_bytes(lm.device),
        constants=read_constants(lm.model.config, parameters, lm.context_length),
    )


def _sample(lm: FrozenLM, num_tokens: int) -> torch.Tensor:
    """About `num_tokens` tokens [B, T] of the language reference, which every Python carries."""
    length = min(SEQUENCE_TOKENS, lm.context_length)
    wanted = math.ceil(num_tokens / length) * length
    ids: list[int] = []
    texts = itertools.cycle(text for _, text in sorted(pydoc_data.topics.topics.items()))
    with quiet_transformers():  # it would warn of texts longer than the context, cut below
        while len(ids) < wanted:
            ids += lm.tokenizer.encode(next(texts), add_special_tokens=False)
    return torch.tensor(ids[:wanted], device=lm.device).view(-1, length)
