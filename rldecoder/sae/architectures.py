"""The architectures on one page: which latents fire on a training batch, and how.

- topk: the k largest of each token (Gao et al. 2024, arXiv 2406.04093)
- batchtopk: the N k largest of the batch (Bussmann et al. 2024, arXiv 2412.06410)
- matryoshka: the same, in nested dictionaries (Bussmann et al. 2025, arXiv 2503.17547)
- jumprelu: above a learnt threshold, L0 held by a penalty (Rajamanoharan et al. 2024, arXiv
  2407.14435)
- relu: above zero, kept few by an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity")

One dense product, in `matmul_dtype`, finds the pairs that fire. All else touches only them: the
reconstruction and the gradients, in float32. Activations are float32 too, but for topk, where they
are the product's own (a rounding of bfloat16 moves fvu by some 1e-5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rldecoder.sae.parallel import Group
from rldecoder.sae.selection import top_k
from rldecoder.sae.sparse_ops import (
    Pairs,
    SaeWeights,
    bags_of,
    decode_pairs,
    encode_pairs,
)

Architecture = Literal["topk", "batchtopk", "matryoshka", "jumprelu", "relu"]

DENSE_ABOVE = 0.05
"""Share of candidate pairs from which dense products are the faster way (measured on 2 cores)."""

FLOOR_MARGIN = 0.1
"""How far below the last batch's smallest chosen value the next batch's candidates begin. It
decides the speed of `batchtopk`, never what is chosen."""

_CHUNK_TOKENS = 4096
"""Tokens whose pre-activations exist at one time on a CPU (94 MB for 5,760 latents)."""


class Rule(NamedTuple):
    """How latents are chosen."""

    architecture: Architecture
    k: int = 0
    """topk, batchtopk, matryoshka: active latents a token (on average over the batch)."""
    prefixes: tuple[int, ...] = ()
    """matryoshka: sizes of the nested dictionaries, ascending; the last one is L."""
    bandwidth: float = 0.0
    """jumprelu: width of the window around a threshold from which it learns."""


class Autoencoded(NamedTuple):
    """A batch through the autoencoder; gradients flow through all but `fired` and `cut`."""

    levels: Tensor
    """[N, G, D] float32: reconstructions from the nested dictionaries (G = 1 but for matryoshka);
    the last one reads all latents."""
    acts: Tensor
    """float32, >= 0: [M] of the pairs, or [N, L] where dense was the faster way."""
    gates: Tensor
    """Shape of `acts`: 1 where a latent fires. For jumprelu a gradient reaches the thresholds."""
    fired: Tensor
    """[L] bool: latents that fired on some token."""
    cut: float
    """batchtopk, matryoshka: the smallest chosen pre-activation, not below 0; else 0."""


def autoencode(
    x: Tensor,
    weights: SaeWeights,
    rule: Rule,
    log_threshold: Tensor | None = None,
    matmul_dtype: torch.dtype = torch.float32,
    floor: float = math.inf,
    group: Group | None = None,
) -> Autoencoded:
    """Encode and decode a training batch.

    Args:
        x: [N, D] float32, scaled inputs.
        weights: of the SAE in training.
        rule: the architecture.
        log_threshold: [L], jumprelu only.
        matmul_dtype: of the product that finds the candidates.
        floor: batchtopk and matryoshka: candidates lie above it (a hint; see `FLOOR_MARGIN`).
        group: of the processes whose tokens make up the batch; batchtopk and matryoshka choose
            among all of them.
    """
    known, cut = None, 0.0
    with torch.no_grad():
        pairs: Pairs | None
        if rule.architecture == "topk":
            pairs, known = _choose_top_k(x, weights, rule.k, matmul_dtype)
        elif rule.architecture in ("batchtopk", "matryoshka"):
            pairs, known, cut = _choose_batch_top_k(
                x, weights, rule.k, matmul_dtype, floor, group or Group()
            )
        elif log_threshold is not None:
            pairs = _choose_above(x, weights, log_threshold.exp() - rule.bandwidth, matmul_dtype)
        else:
            pairs = _choose_above(x, weights, torch.zeros_like(weights.b_enc), matmul_dtype)
    if pairs is None:
        return autoencode_dense(x, weights, rule, log_threshold)
    pre_acts = encode_pairs(x, weights, pairs, known)
    threshold = None if log_threshold is None else log_threshold.exp()[pairs.latents]
    acts, gates = _activate(pre_acts, threshold, rule.bandwidth)
    ends = rule.prefixes or (pairs.num_latents,)
    sums = decode_pairs(acts, weights.dec, pairs, bags_of(pairs, ends))
    fired = torch.zeros_like(weights.b_enc).index_add(0, pairs.latents, gates.detach()) > 0
    return Autoencoded(_nested(sums, len(x)) + weights.b_dec, acts, gates, fired, cut)


def autoencode_dense(
    x: Tensor, weights: SaeWeights, rule: Rule, log_threshold: Tensor | None = None
) -> Autoencoded:
    """The same by dense products and torch's own autograd: oracle, and faster for many actives."""
    pre_acts = F.linear(x - weights.b_dec, weights.enc, weights.b_enc)
    threshold = None if log_threshold is None else log_threshold.exp()
    acts, gates = _activate(pre_acts, threshold, rule.bandwidth)
    cut = 0.0
    if rule.k:
        with torch.no_grad():
            if rule.architecture == "topk":
                chosen = pre_acts.topk(rule.k, dim=1).indices
                kept = torch.zeros_like(pre_acts).scatter(1, chosen, 1.0)
            else:
                best = pre_acts.flatten().topk(len(x) * rule.k)
                kept = torch.zeros_like(pre_acts).flatten()
                kept = kept.index_fill(0, best.indices, 1.0).view_as(pre_acts)
                cut = max(float(best.values[-1]), 0.0)
        acts, gates = acts * kept, gates * kept
    ends = rule.prefixes or (acts.shape[1],)
    levels = torch.stack([acts[:, :end] @ weights.dec[:end] for end in ends], dim=1)
    return Autoencoded(levels + weights.b_dec, acts, gates, (gates > 0).any(0), cut)


def _activate(
    pre_acts: Tensor, threshold: Tensor | None, bandwidth: float
) -> tuple[Tensor, Tensor]:
    """Activations and gates of pre-activations, before any choice among them."""
    if threshold is None:
        acts = torch.relu(pre_acts)
        return acts, (acts.detach() > 0).to(acts.dtype)
    acts, gates = _JumpRelu.apply(pre_acts, threshold.expand_as(pre_acts), bandwidth)
    return acts, gates


class _JumpRelu(torch.autograd.Function):
    """acts = z H(z - theta) and gates = H(z - theta), with the paper's straight-through gradients.

    Rajamanoharan et al. 2024, equations 11 and 12: with a rectangular kernel K of width e,
    d acts / d theta = -(theta / e) K((z - theta) / e) and d gates / d theta = -(1 / e) K(...).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
        gates = (z > theta).to(z.dtype)
        ctx.save_for_backward(z, theta, gates)
        ctx.width = width
        return z * gates, gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_acts: Tensor, grad_gates: Tensor) -> tuple[Tensor | None, ...]:
        z, theta, gates = ctx.saved_tensors
        window = ((z - theta).abs() < ctx.width / 2).to(z.dtype) / ctx.width
        return grad_acts * gates, -window * (theta * grad_acts + grad_gates), None


def _nested(sums: Tensor, num_tokens: int) -> Tensor:
    """Sums over each group of latents [N * G, D] as sums over nested dictionaries [N, G, D]."""
    groups = sums.view(num_tokens, -1, sums.shape[1])
    return groups if groups.shape[1] == 1 else groups.cumsum(1)


def _pre_acts(x: Tensor, weights: SaeWeights, dtype: torch.dtype) -> Iterator[Tensor]:
    """Pre-activations of a batch [N, D] in `dtype`, some tokens [n, L] at a time."""
    centred = (x - weights.b_dec).to(dtype)
    enc, b_enc = weights.enc.to(dtype), weights.b_enc.to(dtype)
    for part in centred.split(_CHUNK_TOKENS if x.device.type == "cpu" else len(x)):
        yield F.linear(part, enc, b_enc)


def _choose_top_k(
    x: Tensor, weights: SaeWeights, k: int, dtype: torch.dtype
) -> tuple[Pairs, Tensor]:
    """The k largest of each token, and their pre-activations."""
    chosen = [top_k(part, k) for part in _pre_acts(x, weights, dtype)]
    latents = torch.cat([part.indices.flatten() for part in chosen])
    offsets = torch.arange(0, len(latents), k, device=x.device)
    # A chosen value below 0 is given as 0, which is as inactive.
    known = torch.cat([part.acts.flatten() for part in chosen]).float()
    return Pairs(latents, offsets, len(weights.enc)), known


def _choose_batch_top_k(
    x: Tensor, weights: SaeWeights, k: int, dtype: torch.dtype, floor: float, group: Group
) -> tuple[Pairs, Tensor, float]:
    """The N * k pairs with the largest pre-activations, these, and the smallest of them.

    N counts the tokens of all processes; the pairs are this one's. Candidates above `floor` are
    ranked by their exact float32 values, so that which pairs are chosen depends neither on the
    floor nor on ties of a short float format.
    """
    wanted = len(x) * k * group.size
    candidates = None
    if math.isfinite(floor):
        candidates = _above(x, weights, torch.full_like(weights.b_enc, floor), dtype, math.inf)
    if candidates is None or group.total(len(candidates.latents)) < wanted:
        dense = torch.cat(list(_pre_acts(x, weights, dtype)))
        cut = float(group.largest(dense.flatten(), wanted)[-1])
        candidates = Pairs.of_mask(dense >= cut - FLOOR_MARGIN * abs(cut))
    values = encode_pairs(x, weights, candidates)
    if group.size == 1:
        best = values.topk(wanted, sorted=False)
        keep = torch.zeros_like(values, dtype=torch.bool)
        keep[best.indices] = True
        return candidates.subset(keep), values[keep], max(float(best.values.min()), 0.0)
    # Equal values at the cut are all kept: nobody knows which of them another process holds.
    cut = float(group.largest(values, wanted)[-1])
    keep = values >= cut
    return candidates.subset(keep), values[keep], max(cut, 0.0)


def _choose_above(
    x: Tensor, weights: SaeWeights, floor: Tensor, dtype: torch.dtype
) -> Pairs | None:
    """Pairs above a floor for each latent [L]; None when they are too many to be sparse."""
    return _above(x, weights, floor, dtype, DENSE_ABOVE * len(x) * len(weights.enc))


def _above(
    x: Tensor, weights: SaeWeights, floor: Tensor, dtype: torch.dtype, most: float
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
