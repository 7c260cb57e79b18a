"""Interpretability benchmarks: label coverage, importance mass, faithfulness of rankings.

Comprehensiveness and sufficiency follow ERASER (arXiv 1911.03429) with features in the place of
words: how much of the prediction goes when the top k features go, and how much is missing when
only they stay.

Axes: N position, K active latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.statistics import bootstrap_mean_ci, paired_bootstrap_pvalue, wilson_interval
from rldecoder.sae.model import SparseLatents

DELETION_KS = (1, 5, 10, 20, 50)
COVERAGE_KS = (10, 50, 100, 1000)
POSITIONS_PER_CHUNK = 256


def label_coverage(high_confidence: Sequence[bool]) -> dict[str, Any]:
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
        result[name] = {"coverage": share, "low": low, "high": high, "features": size}
    return result


def ranking_orders(
    latents: SparseLatents,
    attributions: Tensor,
    normalised: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
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
    decoder: SaeDecoderForCausalLM, latents: SparseLatents, order: Tensor
) -> dict[str, Tensor]:
    """Comprehensiveness and sufficiency of a ranking, [N, len(DELETION_KS)] each.

    comprehensiveness(k) = p(token) - p(token without the top k): higher is better.
    sufficiency(k) = p(token) - p(token with the top k alone): lower is better.
    """
    rank = order.argsort(-1)
    before, token = decoder_probability(decoder, latents)
    found: dict[str, list[Tensor]] = {"comprehensiveness": [], "sufficiency": []}
    for k in DELETION_KS:
        for name, keep in (("comprehensiveness", rank >= k), ("sufficiency", rank < k)):
            patched = SparseLatents(latents.acts * keep, latents.indices)
            after, _ = decoder_probability(decoder, patched, token)
            found[name].append(before - after)
    return {name: torch.stack(columns, dim=-1) for name, columns in found.items()}


def decoder_probability(
    decoder: SaeDecoderForCausalLM, latents: SparseLatents, token: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """p(token) [N] and the token [N]: the decoder's first choice, unless one is given."""
    probabilities, tokens = [], []
    for start in range(0, len(latents.acts), POSITIONS_PER_CHUNK):
        part = slice(start, start + POSITIONS_PER_CHUNK)
        chunk = SparseLatents(latents.acts[part], latents.indices[part])
        p = decoder.logits(chunk).softmax(-1)
        chosen = p.argmax(-1) if token is None else token[part]
        probabilities.append(p.gather(-1, chosen[:, None])[:, 0])
        tokens.append(chosen)
    return torch.cat(probabilities), torch.cat(tokens)


def deletion_benchmark(
    decoder: SaeDecoderForCausalLM,
    latents: SparseLatents,
    orders: Mapping[str, Tensor],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Both scores of every ranking, averaged over DELETION_KS, tested against the random order."""
    averaged: dict[str, dict[str, np.ndarray[Any, np.dtype[np.float64]]]] = {}
    result: dict[str, Any] = {"ks": list(DELETION_KS), "positions": len(latents.acts)}
    for name, order in orders.items():
        scores = deletion_scores(decoder, latents, order)
        averaged[name] = {
            key: value.mean(-1).double().cpu().numpy() for key, value in scores.items()
        }
        result[name] = {
            key: {
                **bootstrap_mean_ci(averaged[name][key], resamples=resamples, seed=seed)._asdict(),
                "by_k": value.mean(0).tolist(),
            }
            for key, value in scores.items()
        }
    for name in orders:
        if name != "random":
            result[name]["comprehensiveness"]["against_random"] = paired_bootstrap_pvalue(
                averaged[name]["comprehensiveness"],
                averaged["random"]["comprehensiveness"],
                resamples=resamples,
                seed=seed,
            )._asdict()
    return result
