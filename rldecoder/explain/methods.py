"""What each method claims at a position: Method B, and the simpler ones it must beat.

Every method makes as many claims a position as Method B did there. A claim is a latent with a
sign (does removing it lower log p?) and a strength (what a reader of the explanation would add
up when the latent is removed).

Axes: N position, n claim (at most max_claims), C candidate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from rldecoder.explain.explainer import Explainer, Pointers, Slots, make_slots
from rldecoder.explain.pairs import Pairs
from rldecoder.sae.model import Sae, SparseLatents

METHOD_B = "method_b"
BASELINES = ("method_a", "attribution_top_k", "mean_explanation", "prompt_only", "random_features")
"""Those that Method B is to beat; `attribution_above_noise` is there to explain the difference."""
POSITIONS_AT_ONCE = 256


class ClaimSet(NamedTuple):
    """The claims of one method at N positions, strongest first."""

    latents: Tensor
    """[N, n] int64."""
    signs: Tensor
    """[N, n]: +1 supports, -1 opposes; or the predicted effect in nats, where there is one."""
    mask: Tensor
    """[N, n] bool."""
    strengths: Tensor
    """[N, n]: what the claim says of removing the latent, in the method's own unit."""


@torch.no_grad()
def point(explainer: Explainer, sae: Sae, pairs: Pairs) -> Pointers:
    """The explainer's output for all positions."""
    slots = make_slots(explainer, sae, pairs.candidates)
    parts = [
        explainer(Slots(*(column[start : start + POSITIONS_AT_ONCE] for column in slots)))
        for start in range(0, len(slots.mask), POSITIONS_AT_ONCE)
    ]
    return Pointers(*(torch.cat(column) for column in zip(*parts, strict=True)))


def claims_of_method_b(explainer: Explainer, pointers: Pointers, test: Pairs) -> ClaimSet:
    """The explainer's claims; the strength is the predicted effect, nats."""
    chosen = explainer.choose(pointers)
    count = min(explainer.spec.max_claims, chosen.shape[1])
    order = pointers.logits.masked_fill(~chosen, float("-inf")).argsort(-1, descending=True)
    order = order[:, :count]
    effects = pointers.effects.gather(1, order)
    latents = test.candidates.indices.gather(1, order)
    return ClaimSet(latents, effects, chosen.gather(1, order), effects)


def claims_of_baselines(
    explainer: Explainer,
    train: Pairs,
    test: Pairs,
    mask: Bool[Tensor, "places claims"],
    noise: Float[Tensor, "places candidates"],
    generator: torch.Generator,
) -> dict[str, ClaimSet]:
    """What the simpler methods claim, as many a position as `mask` [N, n] allows.

    - `method_a`: the most active features (over their usual high), all taken as support. Strength:
      that normalised activation.
    - `attribution_top_k`: the largest first-order attributions of the frozen model, with their
      sign, which are the strengths, too.
    - `attribution_above_noise`: the same, those first whose attribution exceeds the noise floor and
      the smallest useful effect.
    - `mean_explanation`: the latents that matter most on average, whatever the text. Strength:
      their mean effect over the training pairs that have them.
    - `prompt_only`: the latents that matter most after this token on average; sees the text's
      last token, not the features. Strength: the mean effect after this token.
    - `random_features`: active features and signs by lot. Strength: 1, since a sign by lot could
      only mislead a reader who adds up.
    """
    count = mask.shape[1]

    latents = test.positions.latents
    scales = explainer.scales[latents.indices]
    normalised = torch.where(scales > 0, latents.acts / scales.clamp_min(1e-9), 0.0)
    active = latents.acts > 0
    lot = torch.rand(active.shape, generator=generator).to(active.device)
    coin = torch.rand(mask.shape, generator=generator).to(active.device)

    attributions = test.candidates.attributions
    attributed = attributions.abs().topk(count, dim=-1).indices
    worthwhile = attributions.abs() > noise.clamp_min(explainer.spec.min_effect)
    filtered = _marked_first(attributions.abs(), worthwhile, count)
    ranked = normalised.masked_fill(~active, -1).topk(count, dim=-1).indices
    drawn = lot.masked_fill(~active, -1).topk(count, dim=-1).indices

    by_all, by_token = _mean_effects(train, count)
    rows = [by_token.get(int(token), by_all) for token in test.positions.context_token]
    ones = torch.ones_like(coin)
    return {
        "method_a": ClaimSet(
            latents.indices.gather(1, ranked), ones, mask, normalised.gather(1, ranked)
        ),
        "attribution_top_k": _by_attribution(test, attributed, mask),
        "attribution_above_noise": _by_attribution(test, filtered, mask),
        "mean_explanation": _fixed_claims([by_all] * len(mask), mask),
        "prompt_only": _fixed_claims(rows, mask),
        "random_features": ClaimSet(
            latents.indices.gather(1, drawn), (coin - 0.5).sign(), mask, ones
        ),
    }


def _marked_first(
    sizes: Float[Tensor, "places candidates"], marked: Bool[Tensor, "places candidates"], count: int
) -> Int[Tensor, "places claims"]:
    """Slots of the largest of those that are marked, then of the others."""
    order = sizes.argsort(dim=-1, descending=True, stable=True)
    first = marked.gather(1, order).int().argsort(dim=-1, descending=True, stable=True)
    return order.gather(1, first)[:, :count]


def _by_attribution(test: Pairs, slots: Tensor, mask: Tensor) -> ClaimSet:
    attributions = test.candidates.attributions.gather(1, slots)
    return ClaimSet(test.candidates.indices.gather(1, slots), attributions, mask, attributions)


class _Average(NamedTuple):
    latent: int
    total: float
    """Summed effect, nats: how much the latent matters overall."""
    mean: float
    """Effect where it is a candidate, nats."""


def _fixed_claims(rows: list[list[_Average]], mask: Tensor) -> ClaimSet:
    latents = torch.zeros(mask.shape, dtype=torch.int64)
    signs, strengths = torch.ones(mask.shape), torch.zeros(mask.shape)
    for i, row in enumerate(rows):
        for j, (latent, total, mean) in enumerate(row[: mask.shape[1]]):
            latents[i, j], signs[i, j], strengths[i, j] = latent, 1 - 2 * (total < 0), mean
    device = mask.device
    return ClaimSet(latents.to(device), signs.to(device), mask, strengths.to(device))


def _mean_effects(train: Pairs, count: int) -> tuple[list[_Average], dict[int, list[_Average]]]:
    """Latents with the largest summed effects: over all pairs, and after each token."""
    real = train.candidates.acts > 0
    tokens = train.positions.context_token.to(real.device)[:, None].expand_as(real)
    token, latent, effect = (
        column[real].cpu().numpy()
        for column in (tokens, train.candidates.indices, train.measured.single)
    )
    largest = _largest(latent, effect, count)
    by_token = {}
    order = np.argsort(token, kind="stable")
    names, first = np.unique(token[order], return_index=True)
    for name, part in zip(names.tolist(), np.split(order, first[1:]), strict=False):
        found = _largest(latent[part], effect[part], count)
        # Tokens with few known latents are filled up with those that matter everywhere; naming a
        # latent twice would be a claim less.
        known = {one.latent for one in found}
        by_token[name] = (found + [one for one in largest if one.latent not in known])[:count]
    return largest, by_token


def _largest(latent: NDArray[Any], effect: NDArray[Any], count: int) -> list[_Average]:
    kinds, at, number = np.unique(latent, return_inverse=True, return_counts=True)
    total = np.bincount(at, effect, minlength=kinds.size)
    order = np.lexsort((kinds, -np.abs(total)))[:count]
    columns = (column[order].tolist() for column in (kinds, total, total / number))
    return [_Average(*row) for row in zip(*columns, strict=True)]


def acts_of(
    latents: SparseLatents, named: Int[Tensor, "places claims"]
) -> Float[Tensor, "places claims"]:
    """[N, n]: activation of each named latent [N, n]; 0 for those that are not active."""
    same = latents.indices[:, None, :] == named[:, :, None]
    return (latents.acts[:, None, :] * same).sum(-1)
