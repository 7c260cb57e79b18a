"""Interpretability benchmarks: label coverage, importance mass, faithfulness of rankings.

Comprehensiveness and sufficiency follow ERASER (arXiv 1911.03429) with features in the place of
words: how much of the prediction goes when the top k features go, and how much is missing when
only they stay.

Axes: N position, K active latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import Places, at_once, resid_of
from rldecoder.evals.statistics import (
    FloatArray,
    PairedTest,
    bootstrap_mean_ci,
    paired_bootstrap_pvalue,
    wilson_interval,
)
from rldecoder.explain.claim_scores import ClaimEvaluation
from rldecoder.interp.tally import ImportanceMass
from rldecoder.sae.model import SparseLatents
from rldecoder.schemas import JsonRecord, optional

DELETION_KS = (1, 5, 10, 20, 50)
COVERAGE_KS = (10, 50, 100, 1000)
ROWS_AT_ONCE = 256


class Coverage(JsonRecord):
    """How many of the most important features have a label of high confidence."""

    coverage: float | None
    """Share, failures included; None without features."""
    low: float
    """Of its Wilson interval, 95 %."""
    high: float
    features: int
    """How many there are."""


class RankingScore(JsonRecord):
    """One score of a ranking, averaged over DELETION_KS, with its 95 % interval."""

    mean: float
    """Probability of the first choice, 0 to 1."""
    low: float
    high: float
    by_k: tuple[float, ...]
    """The score at each of DELETION_KS."""
    against_random: PairedTest | None = optional()
    """The mean minus that of the random order; absent where that is not asked."""


class RankingScores(JsonRecord):
    """What the prediction owes to the features that a ranking puts first."""

    comprehensiveness: RankingScore
    """Lost without the top k: higher is better."""
    sufficiency: RankingScore
    """Missing with the top k alone: lower is better."""


class DeletionBenchmark(JsonRecord):
    """Rankings of the active features, judged by removing features in their order."""

    ks: tuple[int, ...]
    """DELETION_KS."""
    positions: int
    """Predictions."""
    attribution: RankingScores
    """By |first-order effect|."""
    method_a: RankingScores
    """By activation over its usual high."""
    random: RankingScores
    """In random order."""


class Interpretability(JsonRecord):
    """Labels, importance, rankings and claims of a run in one record."""

    label_coverage: dict[str, Coverage]
    """Of `all` labelled features, and of the `top_<k>` most important."""
    importance_mass: ImportanceMass
    """How few latents carry predictions."""
    deletion: DeletionBenchmark
    """How faithful feature rankings are."""
    claims: ClaimEvaluation
    """How well explanations hold."""


def label_coverage(high_confidence: Sequence[bool]) -> dict[str, Coverage]:
    """Share of the top features whose label is of high confidence, failures included.

    Args:
        high_confidence: one flag a feature, most important first.

    Returns: `all` and `top_<k>` for each k that there are features for, each with its Wilson
        interval.
    """
    total = len(high_confidence)
    sizes = {f"top_{k}": k for k in COVERAGE_KS if k < total} | {"all": total}
    result = {}
    for name, size in sizes.items():
        count = sum(high_confidence[:size])
        low, high = wilson_interval(count, size)
        share = count / size if size else None
        result[name] = Coverage(coverage=share, low=low, high=high, features=size)
    return result


def ranking_orders(
    latents: SparseLatents,
    attributions: Float[Tensor, "places active"],
    normalised: Float[Tensor, "places active"],
    generator: torch.Generator,
) -> dict[str, Int[Tensor, "places active"]]:
    """The order [N, K] in which each method removes the active latents, padding last.

    Args:
        latents: acts and indices [N, K].
        attributions: [N, K], first-order effects of the same slots.
        normalised: [N, K], activations over their usual high (Method A).
    """
    padding = latents.acts <= 0
    lot = torch.rand(padding.shape, generator=generator).to(padding.device)
    keys = {"attribution": attributions.abs(), "method_a": normalised, "random": lot}
    return {
        name: key.masked_fill(padding, -1.0).argsort(dim=-1, descending=True, stable=True)
        for name, key in keys.items()
    }


@torch.no_grad()
def deletion_scores(
    decoder: SaeDecoderForCausalLM, places: Places, order: Int[Tensor, "places active"]
) -> dict[str, Float[Tensor, "places sizes"]]:
    """Comprehensiveness and sufficiency of a ranking, [N, len(DELETION_KS)] each.

    comprehensiveness(k) = p(token) - p(token without the top k): higher is better.
    sufficiency(k) = p(token) - p(token with the top k alone): lower is better.
    """
    rank = order.argsort(-1)
    kept = [keep for k in DELETION_KS for keep in (rank >= k, rank < k)]
    shown = torch.stack([torch.ones_like(rank, dtype=torch.bool), *kept], dim=1)
    p = probability_of_first_choice(decoder, places, shown)
    lost = (p[:, :1] - p[:, 1:]).unflatten(1, (len(DELETION_KS), 2))
    return {"comprehensiveness": lost[..., 0], "sufficiency": lost[..., 1]}


def probability_of_first_choice(
    decoder: SaeDecoderForCausalLM, places: Places, kept: Bool[Tensor, "places variants active"]
) -> Float[Tensor, "places variants"]:
    """p(token) when only some of the active latents stay: [N, m].

    Args:
        places: N of them.
        kept: [N, m, K] bool, what stays of each place in each variant; the decoder's first choice
            in variant 0 is the token.
    """
    out = torch.empty(kept.shape[:2], device=places.latents.acts.device)
    for rows, predict in at_once(decoder, places, max(1, ROWS_AT_ONCE // kept.shape[1])):
        acts, indices = places.of(rows).latents
        patched = SparseLatents(acts[:, None] * kept[rows], indices[:, None].expand_as(kept[rows]))
        hidden = predict(resid_of(decoder, patched))
        p = decoder.frozen.lm.unembed(hidden).softmax(-1)
        token = p[:, :1].argmax(-1, keepdim=True)
        out[rows] = p.gather(-1, token.expand(-1, p.shape[1], -1))[..., 0]
    return out


def deletion_benchmark(
    decoder: SaeDecoderForCausalLM,
    places: Places,
    orders: Mapping[str, Int[Tensor, "places active"]],
    *,
    resamples: int,
    seed: int,
) -> DeletionBenchmark:
    """Both scores of every ranking, averaged over DELETION_KS, tested against the random order.

    Args:
        orders: of `ranking_orders`.
    """
    scores = {name: deletion_scores(decoder, places, order) for name, order in orders.items()}
    averaged: dict[tuple[str, str], FloatArray] = {
        (name, key): by_k.mean(-1).double().cpu().numpy()
        for name, both in scores.items()
        for key, by_k in both.items()
    }

    def score(name: str, key: str) -> RankingScore:
        mean, low, high = bootstrap_mean_ci(averaged[name, key], resamples=resamples, seed=seed)
        ahead = None
        if key == "comprehensiveness" and name != "random":
            ahead = paired_bootstrap_pvalue(
                averaged[name, key], averaged["random", key], resamples=resamples, seed=seed
            )
        by_k = tuple(scores[name][key].mean(0).tolist())
        return RankingScore(mean=mean, low=low, high=high, by_k=by_k, against_random=ahead)

    rankings = {
        name: RankingScores(
            comprehensiveness=score(name, "comprehensiveness"),
            sufficiency=score(name, "sufficiency"),
        )
        for name in orders
    }
    return DeletionBenchmark(ks=DELETION_KS, positions=len(places.latents.acts), **rankings)
