"""Is the estimated importance right? Exact ablation of a sample of latents, compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from rldecoder.evals.statistics import Measured, with_interval
from rldecoder.interp.importance import (
    MetricFunction,
    PatchBatch,
    attribute,
    exact_effect,
    sequence_metrics,
)
from rldecoder.schemas import JsonRecord, Scalar, optional

FloatArray = NDArray[np.float64]
Estimator = Literal["attribution_patching", "integrated_gradients"]
MIN_LATENTS = 3
"""With fewer ablated latents nothing can be compared."""
TOP = 10
"""Of `recall_at_10`."""


class Agreement(JsonRecord):
    """How well estimated effects agree with exact ones, with bootstrap intervals over latents.

    Values that are not defined are None."""

    spearman: Measured
    """Rank correlation of the signed effects."""
    recall_at_10: Measured
    """Share of the 10 largest |exact| that are among the 10 largest |estimate|."""
    sign_agreement: Measured
    """Share with the same sign, among latents with an exact effect other than 0."""


class EstimatorChoice(JsonRecord):
    """Which estimator is used for a target, and why."""

    estimator: Estimator
    reason: str
    reached: bool
    """Whether its rank correlation with exact ablation is as high as it should be."""

    @property
    def integrated(self) -> bool:
        """Whether it takes integrated gradients."""
        return self.estimator == "integrated_gradients"


class TargetValidation(JsonRecord):
    """Both estimators beside exact ablation of the same latents on the same tokens."""

    num_latents: int
    """Latents that were ablated."""
    num_metric_positions: int
    """Positions whose metric was read."""
    integrated_steps: int
    """Steps of integrated gradients."""
    reason: str | None
    """Why nothing could be compared; None where it could."""
    estimators: dict[Estimator, Agreement]
    latents: tuple[int, ...]
    """Those ablated: the top of the ranking, then others from all of it."""
    exact: tuple[float, ...]
    """Their exact effects, in their order, in nats; the next two are estimates of the same."""
    attribution_patching: tuple[float, ...]
    integrated_gradients: tuple[float, ...]
    used: EstimatorChoice
    """What `importance` is measured with."""


class EstimatorValidation(JsonRecord):
    """Is estimated importance right? By target; a target that was not asked for is absent."""

    domain: str
    """Whose text it was tried on."""
    decoder: TargetValidation | None = optional()
    """Of the decoder's predictions."""
    frozen: TargetValidation | None = optional()
    """Of the frozen model's."""

    @property
    def targets(self) -> dict[str, TargetValidation]:
        """Those that were asked for."""
        found = {"decoder": self.decoder, "frozen": self.frozen}
        return {name: target for name, target in found.items() if target is not None}

    @property
    def headline(self) -> dict[str, Scalar]:
        """Which estimator is used, and how well it agrees."""
        out: dict[str, Scalar] = {}
        for name, target in self.targets.items():
            agreement = target.estimators[target.used.estimator]
            out |= {
                f"{name}_estimator": target.used.estimator,
                f"{name}_spearman": agreement.spearman.value,
                f"{name}_recall_at_10": agreement.recall_at_10.value,
                f"{name}_sign_agreement": agreement.sign_agreement.value,
            }
        return out


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


class Ablation:
    """Exact ablation over some batches: a pass over all of them for every latent."""

    def __init__(self, metric: MetricFunction, batches: Sequence[PatchBatch]) -> None:
        self.metric, self.batches = metric, batches

    @cached_property
    def _baselines(self) -> list[Tensor]:
        """Of each batch, the metrics with nothing ablated."""
        return [sequence_metrics(self.metric, held, held.latents.acts) for held in self.batches]

    def effect(self, latent: int) -> float:
        """What setting the latent to zero does, in nats."""
        return sum(
            exact_effect(self.metric, batch, latent, baseline)
            for batch, baseline in zip(self.batches, self._baselines, strict=True)
        )


def effects_of(
    ablation: Ablation,
    latents: Sequence[int],
    known: Sequence[float] = (),
    on_exact: Callable[[list[float]], None] = lambda values: None,
) -> list[float]:
    """The exact effects of latents.

    Args:
        known: those of the first ones, which an interrupted validation had found.
        on_exact: called with all of them so far after each new one.
    """
    # The dear part, so each result is kept at once.
    found = list(known)
    for latent in latents[len(found) :]:
        found.append(ablation.effect(latent))
        on_exact(found)
    return found


def validate(
    ablation: Ablation,
    num_latents: int,
    exact: Callable[[Sequence[int]], list[float]],
    *,
    num_top: int,
    num_others: int,
    integrated_steps: int,
    seed: int,
    wanted: str = "auto",
    min_spearman: float = 0.9,
) -> TargetValidation:
    """Compare both estimators with exact ablation on the same tokens, and choose one.

    Args:
        exact: gives the ablation's effects of latents; see `effects_of`.
        wanted: an estimator, or `auto`; see `choose_estimator`.

    With fewer than 3 firing latents nothing can be compared: agreement values are None, and
    `reason` says so.
    """
    metric, batches = ablation.metric, ablation.batches
    estimates: dict[Estimator, FloatArray] = {
        "attribution_patching": estimated_effects(metric, batches, num_latents),
        "integrated_gradients": estimated_effects(metric, batches, num_latents, integrated_steps),
    }

    # Ablation is dear: the latents that the estimate calls important, and some others by chance.
    rng = np.random.default_rng(seed)
    chosen = choose_latents(estimates["attribution_patching"], num_top, num_others, rng)
    found = exact(chosen.tolist())

    # Both on the same latents; with too few of them no correlation means anything.
    found_by = {
        name: agreement(values[chosen], np.array(found), seed=seed)
        for name, values in estimates.items()
    }
    spearman = {name: agrees.spearman.value for name, agrees in found_by.items()}
    too_few = chosen.size < MIN_LATENTS
    return TargetValidation(
        num_latents=chosen.size,
        num_metric_positions=sum(int(batch.metric_mask.sum()) for batch in batches),
        integrated_steps=integrated_steps,
        reason="fewer than 3 latents fire on these tokens" if too_few else None,
        estimators=found_by,
        latents=tuple(chosen.tolist()),
        exact=tuple(map(float, found)),
        attribution_patching=tuple(estimates["attribution_patching"][chosen].tolist()),
        integrated_gradients=tuple(estimates["integrated_gradients"][chosen].tolist()),
        used=choose_estimator(spearman, wanted, min_spearman),
    )


def choose_estimator(
    spearman: Mapping[Estimator, float | None], wanted: str = "auto", min_spearman: float = 0.9
) -> EstimatorChoice:
    """The estimator for one target, from the rank correlations with exact ablation.

    `auto` takes attribution patching, which costs one backward pass, unless it misses
    `min_spearman` and integrated gradients do better. Without a comparison nothing speaks against
    attribution patching.
    """
    cheap, other = spearman["attribution_patching"], spearman["integrated_gradients"]
    said = f"Spearman with exact ablation: attribution patching {_show(cheap)}, "
    said += f"integrated gradients {_show(other)}; asked for {min_spearman:g}"

    chosen: Estimator = "attribution_patching"
    if wanted != "auto":
        chosen = "integrated_gradients" if wanted == "integrated_gradients" else chosen
        said = f"set by the config. {said}"
    elif cheap is not None and cheap < min_spearman and other is not None and other > cheap:
        chosen, said = "integrated_gradients", f"fallback. {said}"
    value = spearman[chosen]
    reached = value is not None and value >= min_spearman
    return EstimatorChoice(estimator=chosen, reason=said, reached=reached)


def _show(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def agreement(
    estimate: FloatArray, exact: FloatArray, *, resamples: int = 1000, seed: int = 0
) -> Agreement:
    """How well estimated effects [n] agree with exact ones."""
    rng = np.random.default_rng(seed)
    size = exact.size
    # The first row is the sample itself, the others its resamples.
    draws = np.concatenate(
        [np.arange(size)[None], rng.integers(0, max(size, 1), (resamples, size))]
    )
    first, second = estimate[draws], exact[draws]
    return Agreement(
        spearman=with_interval(_spearman(first, second)),
        recall_at_10=with_interval(_recall(first, second, TOP)),
        sign_agreement=with_interval(_sign_agreement(first, second)),
    )


def _spearman(a: FloatArray, b: FloatArray) -> FloatArray:
    """Rank correlation of each row [R, n] -> [R]; NaN where a row is constant or too short."""
    if a.shape[1] < MIN_LATENTS:
        return np.full(a.shape[0], np.nan)
    x, y = (stats.rankdata(values, axis=1) for values in (a, b))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return np.divide((x * y).sum(1), scale, out=np.full(len(x), np.nan), where=scale > 0)


def _recall(a: FloatArray, b: FloatArray, top: int) -> FloatArray:
    """Share of each row's `top` largest |b| that are among its `top` largest |a|."""
    if a.shape[1] < MIN_LATENTS:
        return np.full(a.shape[0], np.nan)
    size = min(top, a.shape[1])
    inside = []
    for values in (a, b):
        largest = np.argsort(-np.abs(values), axis=1, kind="stable")[:, :size]
        member = np.zeros(values.shape, bool)
        np.put_along_axis(member, largest, True, axis=1)
        inside.append(member)
    return (inside[0] & inside[1]).sum(1) / size


def _sign_agreement(a: FloatArray, b: FloatArray) -> FloatArray:
    """Share of each row's entries with b != 0 whose signs are equal; NaN where there is none."""
    moved = b != 0
    same = ((np.sign(a) == np.sign(b)) & moved).sum(1)
    count = moved.sum(1)
    return np.divide(same, count, out=np.full(len(a), np.nan), where=count > 0)
