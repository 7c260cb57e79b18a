"""New directions for dead latents (Bricken et al. 2023, "Towards Monosemanticity", appendix)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rldecoder.sae.sparse_ops import SaeWeights

ENCODER_SHARE = 0.2
"""Norm of a new encoder row, as a share of the living rows' mean norm (the paper's value)."""


@torch.no_grad()
def resample_dead(
    weights: SaeWeights,
    optimizer: torch.optim.Optimizer,
    dead: Int[Tensor, " some"],
    x: Float[Tensor, "tokens d_model"],
    recon: Float[Tensor, "tokens d_model"],
    generator: torch.Generator,
) -> int:
    """Point dead latents at inputs that are reconstructed badly; forget their Adam moments.

    An input is drawn with probability proportional to its squared loss, without repetition: a
    batch smaller than the number of dead latents revives only as many as it has tokens.

    Args:
        weights: changed in place.
        optimizer: Adam over exactly these weights.
        dead: [number of dead] int64.
        x: [N, D] inputs; `recon`: their reconstructions.

    Returns:
        How many latents were revived.
    """
    loss = (x - recon).square().sum(1).double().square().cpu()
    count = min(len(dead), int((loss > 0).sum()))
    if count == 0:
        return 0
    tokens = torch.multinomial(loss, count, generator=generator).to(x.device)
    chosen = dead[:count]
    directions = x[tokens] - weights.b_dec
    directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    alive = torch.ones(len(weights.enc), dtype=torch.bool, device=x.device)
    alive[dead] = False
    norms = weights.enc.norm(dim=1)
    mean_norm = norms[alive].mean() if bool(alive.any()) else norms.mean()
    weights.dec[chosen] = directions
    weights.enc[chosen] = directions * (ENCODER_SHARE * mean_norm)
    weights.b_enc[chosen] = 0.0
    for tensor in (weights.enc, weights.b_enc, weights.dec):
        moments = optimizer.state.get(tensor, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in moments:
                moments[name][chosen] = 0.0
    return count
