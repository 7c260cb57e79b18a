"""Features taken out of predictions: what there is to name, noise, and the decoder's own effects.

Claims are about the frozen model (`frozen_effects`); what the same removal does to the decoder
stands beside them. There only the activation at the place of the prediction is changed: removing
feature j moves what the decoder reads there by -act_j W[j], and nothing else. A linear decoder
reads nothing else either; one with blocks goes on looking back at the latents of earlier
positions, which stay (`rldecoder.decoder.places`).

Axes: N place, K active latents, C candidates (at most K), M interventions, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import Places, at_once, resid_of
from rldecoder.sae.model import SparseLatents

LOGIT_ROWS = 256
TWO_SIDED_95 = 1.96
PROBE_SEED = 0
TINY = 1e-6


class Candidates(NamedTuple):
    """The features that may be named in an explanation of N predictions of the frozen model."""

    tokens: Tensor
    """[N] int64: the frozen model's most likely token."""
    logprobs: Tensor
    """[N]: its log probability."""
    acts: Tensor
    """[N, C] float32; 0 is padding."""
    indices: Tensor
    """[N, C] int64: latents."""
    contributions: Tensor
    """[N, C]: what the feature adds to the token's logit in the decoder, by itself."""
    attributions: Tensor
    """[N, C]: first-order estimate of the effect (attribution patching)."""
    sensitivity: Tensor
    """[N, 2]: how strongly the prediction answers to random directions; see `noise_floor`."""


class Measured(NamedTuple):
    """Exact effects in nats."""

    single: Tensor
    """[N, C]: of removing one candidate."""
    joint: Tensor
    """[N, M]: of each intervention (M = 0 when none was asked for)."""
    margins: Tensor
    """[N, M]: by how many nats the token still leads the best other one after the intervention;
    negative when the first choice has changed."""


class Outcomes(NamedTuple):
    """What interventions did to N predictions, M each."""

    effects: Tensor
    """[N, M]: log p(token) - log p(token after the intervention), nats."""
    changed: Tensor
    """[N, M] bool: the most likely token is another one now."""


def decoder_attributions(decoder: SaeDecoderForCausalLM, places: Places) -> Tensor:
    """[N, K]: first-order effects of all active features on the decoder's most likely token."""
    found = torch.zeros_like(places.latents.acts)
    for rows, predict in at_once(decoder, places, LOGIT_ROWS):
        latents = places.of(rows).latents
        with torch.enable_grad():
            resid = resid_of(decoder, latents).detach().requires_grad_()
            logprobs = decoder.frozen.lm.unembed(predict(resid[:, None])[:, 0]).log_softmax(-1)
            (gradient,) = torch.autograd.grad(logprobs.amax(-1).sum(), resid)
        with torch.no_grad():
            found[rows] = decoder.along(latents, gradient)
    return found


@torch.no_grad()
def decoder_effects(
    decoder: SaeDecoderForCausalLM, places: Places, tokens: Tensor, named: Tensor
) -> Tensor:
    """[N, n]: what taking each named latent out does to log p(token) on the decoder, nats.

    Args:
        places: N of them, unpatched.
        tokens: [N] the tokens that the effects are about.
        named: [N, n] latents; one that is not active has no effect.
    """
    effects = torch.zeros(named.shape, device=places.latents.acts.device)
    few = max(1, LOGIT_ROWS // (named.shape[1] + 1))
    for rows, predict in at_once(decoder, places, few):
        here = places.of(rows).latents
        keep = here.indices[:, None] != named[rows, :, None]
        acts = here.acts[:, None] * torch.cat([torch.ones_like(keep[:, :1]), keep], dim=1)
        patched = SparseLatents(acts, here.indices[:, None].expand_as(acts))
        # The unchanged latents are one of the rows: rounding that all share is no effect.
        logprobs = decoder.frozen.lm.unembed(predict(resid_of(decoder, patched))).log_softmax(-1)
        token = tokens[rows, None, None].expand(*acts.shape[:2], 1)
        mine = logprobs.gather(-1, token)[..., 0]
        effects[rows] = mine[:, :1] - mine[:, 1:]
    return effects


def noise_floor(
    candidates: Candidates, row_norms: Float[Tensor, "places candidates"]
) -> Float[Tensor, "places candidates"]:
    """How large an effect chance gives each candidate: [N, C], nats.

    Removing a random direction of the candidate's own length r = |act W_dec[latent]| at the same
    place changes log p by about a normal amount with standard deviation r |g| / sqrt(D), g being
    the gradient of log p by the residual there, around c r^2; the curvature c is measured on
    random directions (`Candidates.sensitivity`, 0 where no probes were made). 95 % of random
    directions stay below the sum of that mean and 1.96 deviations. A feature that does no more
    than this tells nothing about its direction.

    Args:
        row_norms: [N, C], lengths of the candidates' rows of W_dec.
    """
    length = row_norms * candidates.acts
    deviation, mean = candidates.sensitivity[:, None].unbind(-1)
    return TWO_SIDED_95 * length * deviation + length.square() * mean


def random_removals(
    acts: Float[Tensor, "places candidates"],
    count: int,
    generator: torch.Generator,
    share: float = 1.0,
) -> Float[Tensor, "places interventions candidates"]:
    """[N, count, C] interventions: random sets of active candidates, each removed by `share`.

    The set's size is uniform from 1 to the number of active candidates, so that small and
    large interventions are equally common.
    """
    active = acts > 0
    order = torch.rand(len(acts), count, acts.shape[1], generator=generator).to(acts.device)
    rank = order.masked_fill(~active[:, None], 2.0).argsort(-1).argsort(-1)
    total = active.sum(-1)[:, None]
    size = (torch.rand(len(acts), count, generator=generator).to(acts.device) * total).floor() + 1
    chosen = (rank < size.unsqueeze(-1)) & active[:, None]
    return chosen.float() * share
