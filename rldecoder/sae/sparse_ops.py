"""Sparse arithmetic of the SAE: pick active latents, decode from them alone.

With k of L latents active, decoding costs k * D per token in place of L * D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class SparseLatents(NamedTuple):
    """Active latents of each token. An activation of 0 is padding, whatever its index says."""

    acts: Tensor
    """[..., K] float32, >= 0."""
    indices: Tensor
    """[..., K] int64 in [0, num_latents)."""


def top_k(pre_acts: Tensor, k: int) -> SparseLatents:
    """The k largest pre-activations [..., L] of each token, negative ones as zero activations."""
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    return SparseLatents(torch.relu(values), indices)


def sparsify(dense: Tensor) -> SparseLatents:
    """Non-negative activations [..., L] as sparse ones; K is the largest L0 (at least 1)."""
    largest = int((dense > 0).sum(-1).max()) if dense.numel() else 0
    values, indices = dense.topk(max(largest, 1), dim=-1, sorted=False)
    return SparseLatents(values, indices)


def decode_sparse(latents: SparseLatents, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum over K of act * weight[index], plus bias: [..., D] from weight [L, D] and bias [D]."""
    shape = latents.indices.shape
    flat = F.embedding_bag(
        latents.indices.reshape(-1, shape[-1]),
        weight,
        per_sample_weights=latents.acts.reshape(-1, shape[-1]).to(weight.dtype),
        mode="sum",
    )
    return flat.view(*shape[:-1], weight.shape[1]) + bias
