"""Is the estimated importance right? Exact ablation of a sample of latents, compared with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from rldecoder.interp.importance import (
    MetricFunction,
    PatchBatch,
    attribute,
    exact_effect,
)

FloatArray = NDArray[np.float64]
ESTIMATORS = ("attribution_patching", "integrated_gradients")


def estimated_effects(
    metric: MetricFunction,
    batches: Sequence[PatchBatch],
    num_latents: int,
    integrated_steps: int | None = None,
) -> FloatArray:
    """[L] signed importance of every latent, summed over all positions of the batches."""
    total = torch.zeros(num_latents, dtype=torch.float64)
    for batch in batches:
        found = attribute(metric, batch, integrated_steps).latents.double().cpu()
        total.index_add_(0, batch.latents.indices.reshape(-1).cpu(), found.reshape(-1))
    return total.numpy()


def choose_latents(
    importance: FloatArray, num_top: int, num_others: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The top latents by |importance| and others drawn evenly over the rest of the ranking.

    The rest is cut into `num_others` strata of equal size, one latent from each. Latents with
    importance 0 (they do not fire) are never chosen.
    """
    order = np.argsort(-np.abs(importance), kind="stable")
    order = order[np.abs(importance[order]) > 0]
    top, rest = order[:num_top], order[num_top:]
    strata = np.array_split(rest, min(num_others, rest.size)) if rest.size else []
    others = [int(rng.choice(stratum)) for stratum in strata if stratum.size]
    return np.concatenate([top, np.array(others, np.int64)]).astype(np.int64)


def validate(
    metric: MetricFunction,
    batches: Sequence[PatchBatch],
    num_latents: int,
    *,
    num_top: int,
    num_others: int,
    integrated_steps: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Compare both estimators with exact ablation on the same tokens.

    Returns the agreement of each estimator (see `agreement`), how many latents were ablated, and
    the values themselves. With fewer than 3 firing latents nothing can be compared: agreement
    values are None, and `reason` says so.
    """
    estimates = {
        "attribution_patching": estimated_effects(metric, batches, num_latents),
        "integrated_gradients": estimated_effects(metric, batches, num_latents, integrated_steps),
    }
    rng = np.random.default_rng(seed)
    chosen = choose_latents(estimates["attribution_patching"], num_top, num_others, rng)
    exact = np.zeros(chosen.size)
    for index, latent in enumerate(chosen):
        exact[index] = sum(exact_effect(metric, batch, int(latent)) for batch in batches)
        advance()
    return {
        "num_latents": int(chosen.size),
        "num_metric_positions": int(sum(int(batch.metric_mask.sum()) for batch in batches)),
        "integrated_steps": integrated_steps,
        "reason": None if chosen.size >= 3 else "fewer than 3 latents fire on these tokens",
        "estimators": {
            name: agreement(values[chosen], exact, seed=seed) for name, values in estimates.items()
        },
        "latents": [int(latent) for latent in chosen],
        "exact": [float(value) for value in exact],
        **{name: [float(v) for v in values[chosen]] for name, values in estimates.items()},
    }


def agreement(
    estimate: FloatArray,
    exact: FloatArray,
    *,
    top: int = 10,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How well estimated effects [n] agree with exact ones, with bootstrap intervals over latents.

    spearman: rank correlation of the signed effects. recall_at_10: share of the 10 largest |exact|
    that are among the 10 largest |estimate|. sign_agreement: share with the same sign, among
    latents with an exact effect other than 0. Values that are not defined are None.
    """
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, exact.size, exact.size) for _ in range(resamples if exact.size else 0)]
    out: dict[str, Any] = {}
    for name, function in (
        ("spearman", _spearman),
        (f"recall_at_{top}", lambda a, b: _recall(a, b, top)),
        ("sign_agreement", _sign_agreement),
    ):
        value = function(estimate, exact)
        found = [function(estimate[draw], exact[draw]) for draw in draws]
        kept = [number for number in found if number is not None]
        tail = (1 - confidence) / 2
        low, high = np.quantile(kept, [tail, 1 - tail]) if kept else (None, None)
        out[name] = {
            "value": value,
            "low": None if value is None or low is None else float(low),
            "high": None if value is None or high is None else float(high),
        }
    return out


def _spearman(a: FloatArray, b: FloatArray) -> float | None:
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    ranks = np.corrcoef(stats.rankdata(a), stats.rankdata(b))
    return float(ranks[0, 1])


def _recall(a: FloatArray, b: FloatArray, top: int) -> float | None:
    if a.size < 3:
        return None
    size = min(top, a.size)
    first = set(np.argsort(-np.abs(a), kind="stable")[:size].tolist())
    second = set(np.argsort(-np.abs(b), kind="stable")[:size].tolist())
    return len(first & second) / size


def _sign_agreement(a: FloatArray, b: FloatArray) -> float | None:
    moved = b != 0
    if not moved.any():
        return None
    return float((np.sign(a[moved]) == np.sign(b[moved])).mean())
