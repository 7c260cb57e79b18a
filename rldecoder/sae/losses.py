"""Loss terms of SAE training. Inputs are scaled to unit variance per dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from rldecoder.sae.selection import top_k
from rldecoder.sae.sparse_ops import SaeWeights


def reconstruction_loss(
    levels: Float[Tensor, "tokens groups d_model"], x: Float[Tensor, "tokens d_model"]
) -> Float[Tensor, ""]:
    """Mean squared error per element; on inputs of unit variance it approximates fvu.

    Args:
        levels: [N, G, D] reconstructions; the mean over them is what nested dictionaries
            (matryoshka) are trained on.
        x: [N, D]
    """
    return (levels - x[:, None]).square().mean()


def l0_loss(l0: Float[Tensor, ""], target: float) -> Float[Tensor, ""]:
    """(L0 / target - 1)^2: keeps the mean L0 of jumprelu at a target (arXiv 2407.14435, app. F)."""
    return (l0 / target - 1).square()


def l1_loss(acts: Float[Tensor, " *cells"], num_tokens: int) -> Float[Tensor, ""]:
    """Sum of activations a token; decoder rows have unit norm, which would else be a weight."""
    return acts.sum() / num_tokens


def auxk_loss(
    x: Float[Tensor, "tokens d_model"],
    error: Float[Tensor, "tokens d_model"],
    weights: SaeWeights,
    dead: Int[Tensor, " some"],
    auxk: int,
    matmul_dtype: torch.dtype = torch.float32,
    mean_over_processes: Callable[[Tensor], Tensor] = lambda value: value,
) -> Float[Tensor, ""]:
    """How well the `auxk` strongest dead latents explain what the living ones leave over.

    Gao et al. 2024 (arXiv 2406.04093), appendix A.2: squared error of reconstructing `error` from
    dead latents alone, over the squared error itself. Only dead latents get a gradient.

    Args:
        x: [N, D] inputs.
        error: [N, D] x - recon; no gradient flows into it.
        weights: the SAE's.
        dead: [number of dead] int64, not empty.
        auxk: how many of them may fire a token.
        matmul_dtype: of the products.
        mean_over_processes: applied to the squared error, which is the whole batch's.

    Returns:
        A scalar; 1 when the dead latents explain nothing. With fewer dead latents than `auxk` it
        is scaled down in proportion, so that the last few cannot disturb training.
    """
    error = error.detach()
    k = min(auxk, len(dead))
    centred = (x - weights.b_dec.detach()).to(matmul_dtype)
    enc, dec = weights.enc[dead].to(matmul_dtype), weights.dec[dead].to(matmul_dtype)
    pre_acts = F.linear(centred, enc, weights.b_enc[dead].to(matmul_dtype))
    if k < len(dead):
        chosen = top_k(pre_acts.detach(), k).indices
        mask = torch.zeros_like(pre_acts).scatter(1, chosen, 1.0)
        pre_acts = pre_acts * mask
    recon = (torch.relu(pre_acts) @ dec).float()
    total = mean_over_processes(error.square().sum()).clamp_min(1e-12)
    share = (recon - error).square().sum() / total
    return share * (k / auxk)
