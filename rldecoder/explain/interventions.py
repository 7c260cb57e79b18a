"""Interventions of several kinds on active features: one seen in training, three not.

Axes: N position, M intervention, K active latents.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rldecoder.explain.patching import random_removals
from rldecoder.sae.model import SparseLatents

SEEN_KIND = "removal"
KINDS = (SEEN_KIND, "halving", "amplifying", "swapping")
ALL_KINDS = "all"
"""Scores over all kinds together have this name."""


def random_interventions(
    latents: SparseLatents, donors: SparseLatents, count: int, generator: torch.Generator
) -> dict[str, Float[Tensor, "places _ active"]]:
    """Shares [N, count, K] taken from each activation, by kind, on random sets of active latents.

    - `removal`: the set's activations become 0, as in training.
    - `halving`: they are halved.
    - `amplifying`: they are doubled.
    - `swapping`: each becomes what the latent's activation is at a random one of the positions in
      `donors` where it is active; 0 where it is active in none.

    Sets are drawn anew for each kind, with sizes as in `random_removals`. They are drawn from all
    active latents, not only from those that an explanation could name.

    Args:
        latents: acts and indices [N, K] of the positions; act 0 is padding.
        donors: acts and indices [N', K'] of other positions.
    """
    sets = {kind: random_removals(latents.acts, count, generator) for kind in KINDS}
    borrowed = borrowed_acts(latents.indices, donors, count, generator)
    # Padding has act 0 and is in no set.
    swapped = 1 - borrowed / latents.acts.clamp_min(1e-9)[:, None]
    return {
        "removal": sets["removal"],
        "halving": 0.5 * sets["halving"],
        "amplifying": -sets["amplifying"],
        "swapping": torch.where(sets["swapping"] > 0, swapped, 0.0),
    }


def borrowed_acts(
    indices: Int[Tensor, "places active"],
    donors: SparseLatents,
    count: int,
    generator: torch.Generator,
) -> Float[Tensor, "places interventions active"]:
    """[N, count, K]: for each latent a random one of its activations in `donors`, 0 if none."""
    active = (donors.acts > 0).flatten()
    latent, act = donors.indices.flatten()[active], donors.acts.flatten()[active]
    order = latent.argsort(stable=True)
    latent, act = latent[order].contiguous(), act[order]
    first = torch.searchsorted(latent, indices.contiguous())
    number = torch.searchsorted(latent, indices.contiguous(), right=True) - first
    lot = torch.rand(len(indices), count, indices.shape[1], generator=generator).to(act.device)
    place = first[:, None] + (lot * number[:, None]).floor().long()
    found = act[place.clamp(max=max(len(act) - 1, 0))] if len(act) else torch.zeros_like(lot)
    return torch.where(number[:, None] > 0, found, 0.0)
