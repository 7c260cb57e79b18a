"""Sparse arithmetic of the SAE: pick active latents, decode from them, differentiate along them.

Words: N tokens, L latents, D model width, K active latents a token, M active (token, latent)
pairs in a batch (M = N * K for TopK). A dense autoencoder multiplies five [N, L, D] products a
training step; here only the encoder's forward product is dense, and everything else costs M * D.

The kernels are torch's own (`embedding_bag` and its parts), on the CPU and on CUDA alike.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rldecoder.sae.selection import SparseLatents, cells_of


class SaeWeights(NamedTuple):
    """Weights in training layout: the encoder too has one latent a row."""

    enc: Tensor
    """[L, D], the transpose of W_enc."""
    b_enc: Tensor
    """[L]"""
    dec: Tensor
    """[L, D]"""
    b_dec: Tensor
    """[D]"""


class Pairs:
    """The (token, latent) pairs of a batch that count, token by token.

    Args:
        latents: [M] int64, the latent of each pair.
        offsets: [N] int64, where each token's pairs begin.
    """

    def __init__(
        self, latents: Int[Tensor, " pairs"], offsets: Int[Tensor, " tokens"], num_latents: int
    ) -> None:
        self.latents, self.offsets, self.num_latents = latents, offsets, num_latents

    @classmethod
    def of_mask(cls, mask: Bool[Tensor, "tokens latents"]) -> Pairs:
        """The pairs that are true in [N, L]; a token's latents are in ascending order."""
        latents, counts = cells_of(mask)
        return cls(latents, counts.cumsum(0) - counts, mask.shape[1])

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.offsets)

    @cached_property
    def tokens(self) -> Int[Tensor, " pairs"]:
        """The token of each pair: [M] int64."""
        ends = torch.cat([self.offsets[1:], self.offsets.new_tensor([len(self.latents)])])
        tokens = torch.arange(len(self.offsets), device=self.offsets.device)
        return tokens.repeat_interleave(ends - self.offsets, output_size=len(self.latents))

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " latents"]]:
        """The order [M] that sorts pairs by latent, and where each latent begins in it [L]."""
        # Short keys sort three times as fast; a stable sort keeps sums in one order, run after run.
        keys = self.latents.to(torch.int16) if self.num_latents <= 1 << 15 else self.latents
        order = keys.sort(stable=True).indices
        counts = torch.bincount(self.latents, minlength=self.num_latents)
        return order, counts.cumsum(0) - counts

    @cached_property
    def tokens_by_latent(self) -> Int[Tensor, " pairs"]:
        """The token of each pair in that order: [M] int64."""
        return self.tokens[self.by_latent[0]]

    def subset(self, keep: Bool[Tensor, " pairs"]) -> Pairs:
        """Only the pairs that `keep` [M] marks."""
        counts = torch.bincount(self.tokens[keep], minlength=self.num_tokens)
        return Pairs(self.latents[keep], counts.cumsum(0) - counts, self.num_latents)


class Bags(NamedTuple):
    """How pairs are summed: consecutive runs of them, each into one vector."""

    offsets: Tensor
    """[B] int64: where each bag begins among the pairs."""
    of_pair: Tensor
    """[M] int64: the bag of each pair."""


def bags_of(pairs: Pairs, ends: tuple[int, ...]) -> Bags:
    """A bag for each token and group of latents; groups end before the latents `ends`.

    With several groups, each token's latents must be in ascending order.
    """
    if len(ends) == 1:
        return Bags(pairs.offsets, pairs.tokens)
    bounds = torch.tensor(ends, device=pairs.latents.device)
    group = torch.bucketize(pairs.latents, bounds, right=True)
    bag = pairs.tokens * len(ends) + group
    counts = torch.bincount(bag, minlength=pairs.num_tokens * len(ends))
    return Bags(counts.cumsum(0) - counts, bag)


def sparsify(dense: Float[Tensor, "*places latents"]) -> SparseLatents:
    """Non-negative activations [..., L] as sparse ones; K is the largest L0 (at least 1)."""
    largest = int((dense > 0).sum(-1).max()) if dense.numel() else 0
    values, indices = dense.topk(max(largest, 1), dim=-1, sorted=False)
    return SparseLatents(values, indices)


def decode_sparse(
    latents: SparseLatents,
    weight: Float[Tensor, "latents d_model"],
    bias: Float[Tensor, " d_model"],
) -> Float[Tensor, "*places d_model"]:
    """Sum over K of act * weight[index], plus bias: [..., D] from weight [L, D] and bias [D]."""
    shape = latents.indices.shape
    flat = F.embedding_bag(
        latents.indices.reshape(-1, shape[-1]),
        weight,
        per_sample_weights=latents.acts.reshape(-1, shape[-1]).to(weight.dtype),
        mode="sum",
    )
    return flat.view(*shape[:-1], weight.shape[1]) + bias


def encode_pairs(
    x: Float[Tensor, "tokens d_model"],
    weights: SaeWeights,
    pairs: Pairs,
    known: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, " pairs"]:
    """Float32 pre-activations [M] of the given pairs; gradients reach enc, b_enc and b_dec.

    Args:
        x: [N, D] float32, scaled inputs; gets no gradient.
        known: the same values [M] without gradient, where they have been computed already.
    """
    pre_acts: Tensor = _EncodePairs.apply(
        x, weights.enc, weights.b_enc, weights.b_dec, pairs, known
    )
    return pre_acts


def decode_pairs(
    acts: Float[Tensor, " pairs"], dec: Float[Tensor, "latents d_model"], pairs: Pairs, bags: Bags
) -> Float[Tensor, "bags d_model"]:
    """Sum of acts * dec[latent] within each bag: [B, D]; gradients reach acts and dec."""
    sums: Tensor = _DecodePairs.apply(acts, dec, pairs, bags)
    return sums


class _EncodePairs(torch.autograd.Function):
    """The encoder restricted to given pairs; see `encode_pairs`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        pairs: Pairs,
        known: Tensor | None,
    ) -> Tensor:
        centred = x - b_dec
        ctx.save_for_backward(centred, enc)
        ctx.pairs = pairs
        if known is not None:
            return known
        products = _dots(centred, enc, pairs.latents, pairs.offsets, pairs.tokens)
        return products + b_enc[pairs.latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, enc = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        grad_enc = _sum_by_latent(pairs, grad, centred, pairs.tokens)
        grad_b_enc = torch.zeros_like(enc[:, 0]).index_add(0, pairs.latents, grad)
        # b_dec is taken off every input, so its gradient is the biases' through the encoder.
        return None, grad_enc, grad_b_enc, -(grad_b_enc @ enc), None, None


class _DecodePairs(torch.autograd.Function):
    """The decoder restricted to given pairs; see `decode_pairs`."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, dec: Tensor, pairs: Pairs, bags: Bags) -> Tensor:
        ctx.save_for_backward(acts, dec)
        ctx.pairs, ctx.bags = pairs, bags
        return F.embedding_bag(
            pairs.latents, dec, bags.offsets, per_sample_weights=acts, mode="sum"
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        acts, dec = ctx.saved_tensors
        pairs, bags = ctx.pairs, ctx.bags
        grad = grad.contiguous()
        grad_acts = _dots(grad, dec, pairs.latents, bags.offsets, bags.of_pair)
        grad_dec = _sum_by_latent(pairs, acts, grad, bags.of_pair)
        return grad_acts, grad_dec, None, None


def _sum_by_latent(pairs: Pairs, coefficients: Tensor, vectors: Tensor, rows: Tensor) -> Tensor:
    """For each latent, the sum over its pairs of coefficient * vectors[row]: [L, D]."""
    order, offsets = pairs.by_latent
    sorted_rows = pairs.tokens_by_latent if rows is pairs.tokens else rows[order]
    return F.embedding_bag(
        sorted_rows, vectors, offsets, per_sample_weights=coefficients[order], mode="sum"
    )


def _dots(
    vectors: Tensor, rows: Tensor, latents: Tensor, offsets: Tensor, bag_of_pair: Tensor
) -> Tensor:
    """The product vectors[bag] . rows[latent] of every pair: [M].

    This is the gradient that embedding_bag gives its per-sample weights, and torch has a kernel
    for it that does not write the [M, D] rows out.
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors, rows, latents, offsets, bag_of_pair, _SUM_MODE
    )


_SUM_MODE = 0
