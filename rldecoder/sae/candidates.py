"""Which (token, latent) pairs of a training batch fire, found by one dense product.

The product is in `dtype`; all else touches only the pairs that it finds. Pre-activations of pairs
are float32, but for `top_k_pairs`, where they are the product's own (a rounding of bfloat16 moves
fvu by some 1e-5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rldecoder.sae.parallel import Group
from rldecoder.sae.selection import top_k
from rldecoder.sae.sparse_ops import Pairs, SaeWeights, encode_pairs

FLOOR_MARGIN = 0.1
"""How far below the last batch's smallest chosen value the next batch's candidates begin. It
decides the speed of `batchtopk`, never what is chosen."""

_CHUNK_TOKENS = 4096
"""Tokens whose pre-activations exist at one time on a CPU (94 MB for 5,760 latents)."""


class Chosen(NamedTuple):
    """What may fire on a batch."""

    pairs: Pairs
    """Of this process's tokens."""
    pre_acts: Tensor | None = None
    """[M] float32 of the pairs, where the choice has computed them."""
    cut: float = 0.0
    """batchtopk, matryoshka: the smallest chosen pre-activation, not below 0; else 0."""


def top_k_pairs(
    x: Float[Tensor, "tokens d_model"], weights: SaeWeights, k: int, dtype: torch.dtype
) -> Chosen:
    """The k largest of each token [N, D]."""
    chosen = [top_k(part, k) for part in _pre_acts(x, weights, dtype)]
    latents = torch.cat([part.indices.flatten() for part in chosen])
    offsets = torch.arange(0, len(latents), k, device=x.device)
    # A chosen value below 0 is given as 0, which is as inactive.
    known = torch.cat([part.acts.flatten() for part in chosen]).float()
    return Chosen(Pairs(latents, offsets, len(weights.enc)), known)


def batch_top_k_pairs(
    x: Float[Tensor, "tokens d_model"],
    weights: SaeWeights,
    k: int,
    dtype: torch.dtype,
    floor: float,
    group: Group,
) -> Chosen:
    """The N * k pairs with the largest pre-activations; N counts the tokens of all processes.

    Candidates above `floor` are ranked by their exact float32 values, so that which pairs are
    chosen depends neither on the floor nor on ties of a short float format.
    """
    wanted = len(x) * k * group.size
    candidates = None
    if math.isfinite(floor):
        candidates = pairs_above(x, weights, torch.full_like(weights.b_enc, floor), dtype, math.inf)
    if candidates is None or group.total(len(candidates.latents)) < wanted:
        dense = torch.cat(list(_pre_acts(x, weights, dtype)))
        cut = float(group.largest(dense.flatten(), wanted)[-1])
        candidates = Pairs.of_mask(dense >= cut - FLOOR_MARGIN * abs(cut))
    values = encode_pairs(x, weights, candidates)

    if group.size == 1:
        best = values.topk(wanted, sorted=False)
        keep = torch.zeros_like(values, dtype=torch.bool)
        keep[best.indices] = True
        return Chosen(candidates.subset(keep), values[keep], max(float(best.values.min()), 0.0))
    # Equal values at the cut are all kept: nobody knows which of them another process holds.
    cut = float(group.largest(values, wanted)[-1])
    keep = values >= cut
    return Chosen(candidates.subset(keep), values[keep], max(cut, 0.0))


def pairs_above(
    x: Float[Tensor, "tokens d_model"],
    weights: SaeWeights,
    floor: Float[Tensor, " latents"],
    dtype: torch.dtype,
    most: float,
) -> Pairs | None:
    """Pairs whose pre-activation exceeds `floor` [L]; None when there are more than `most`."""
    latents, counts, total = [], [], 0
    for part in _pre_acts(x, weights, dtype):
        found = Pairs.of_mask(part > floor.to(dtype))
        latents.append(found.latents)
        counts.append(
            torch.diff(found.offsets, append=found.offsets.new_tensor([len(found.latents)]))
        )
        total += len(found.latents)
        if total > most:
            return None
    joined = torch.cat(counts)
    return Pairs(torch.cat(latents), joined.cumsum(0) - joined, len(weights.enc))


def _pre_acts(x: Tensor, weights: SaeWeights, dtype: torch.dtype) -> Iterator[Tensor]:
    """Pre-activations of a batch [N, D] in `dtype`, some tokens [n, L] at a time."""
    centred = (x - weights.b_dec).to(dtype)
    enc, b_enc = weights.enc.to(dtype), weights.b_enc.to(dtype)
    for part in centred.split(_CHUNK_TOKENS if x.device.type == "cpu" else len(x)):
        yield F.linear(part, enc, b_enc)
