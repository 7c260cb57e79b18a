"""Exact effects of removing features from the decoder: what explanations must agree with.

The effect of a feature on a prediction is log p(token) - log p(token without the feature), in
nats; positive supports the token. Only the activation at the place of the prediction is changed:
removing a share r_j of each feature j moves what the decoder reads there by -sum_j r_j act_j W[j],
and nothing else. A linear decoder reads nothing else either; one with blocks goes on looking back
at the latents of earlier positions, which stay (`rldecoder.decoder.places`).

Axes: N place, K active latents, C candidates (at most K), M interventions, D model width,
V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import Places, Predict, at_once, resid_of
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import SparseLatents

PLACES_PER_CHUNK = 8192
POSITIONS_PER_BLOCK = 32
VOCABULARY_PER_BLOCK = 2048
LOGIT_ROWS = 256
TWO_SIDED_95 = 1.96
PROBES = 8
"""Random directions, each with its opposite, that show the curvature of blocks."""
PROBE_SEED = 0
TINY = 1e-6


class Candidates(NamedTuple):
    """The features that may be named in an explanation of N predictions."""

    tokens: Tensor
    """[N] int64: the decoder's most likely token."""
    logprobs: Tensor
    """[N]: its log probability."""
    acts: Tensor
    """[N, C] float32; 0 is padding."""
    indices: Tensor
    """[N, C] int64: latents."""
    contributions: Tensor
    """[N, C]: act * W[latent] . U[token], the share of the token's logit."""
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
    negative when the decoder's first choice has changed."""


def find_candidates(
    decoder: SaeDecoderForCausalLM,
    places: Places,
    count: int,
    excluded: Bool[Tensor, " latents"] | None = None,
) -> Candidates:
    """The `count` active latents of each place with the largest |contribution|.

    Args:
        places: N of them.
        count: C is the smaller of `count` and K.
        excluded: [L] bool, latents that are no candidates. They stay active in the prediction;
            a place with too few others is padded.
    """
    count = min(count, places.latents.acts.shape[-1])
    found: list[tuple[Tensor, Candidates]] = [
        (rows, _candidates_of_group(decoder, places.of(rows).latents, predict, count, excluded))
        for rows, predict in at_once(decoder, places, LOGIT_ROWS)
    ]
    order = torch.cat([rows for rows, _ in found]).argsort()
    columns = zip(*(part for _, part in found), strict=True)
    return Candidates(*(torch.cat(column)[order] for column in columns))


def _candidates_of_group(
    decoder: SaeDecoderForCausalLM,
    latents: SparseLatents,
    predict: Predict,
    count: int,
    excluded: Tensor | None,
) -> Candidates:
    lm = decoder.frozen.lm
    linear = not decoder.looks_back

    # Two slopes: of log p, and of the logit, which for a linear decoder is the unembedding's row.
    with torch.enable_grad():
        resid = resid_of(decoder, latents).detach().requires_grad_()
        logits = lm.unembed(predict(resid[:, None])[:, 0])
        logprobs = logits.log_softmax(-1)
        best = logprobs.max(-1)
        (gradient,) = torch.autograd.grad(best.values.sum(), resid, retain_graph=not linear)
        if linear:
            direction = lm.unembedding[best.indices].to(resid.dtype)
        else:
            raised = logits.gather(-1, best.indices[:, None]).sum()
            (direction,) = torch.autograd.grad(raised, resid)

    with torch.no_grad():
        contributions = decoder.along(latents, direction)
        attributions = decoder.along(latents, gradient)
        acts = latents.acts
        if excluded is not None:
            allowed = ~excluded[latents.indices]
            acts, contributions, attributions = (
                column * allowed for column in (acts, contributions, attributions)
            )
        chosen = contributions.abs().topk(count, dim=-1).indices
        if linear:
            sensitivity = _sensitivity(lm, logprobs.detach(), best.indices, gradient)
        else:
            sensitivity = _probed_sensitivity(
                decoder, latents, resid.detach(), predict, best, gradient
            )
    return Candidates(
        best.indices,
        best.values.detach(),
        acts.gather(-1, chosen),
        latents.indices.gather(-1, chosen),
        contributions.gather(-1, chosen),
        attributions.gather(-1, chosen),
        sensitivity,
    )


def _sensitivity(lm: FrozenLM, logprobs: Tensor, tokens: Tensor, gradient: Tensor) -> Tensor:
    """Standard deviation per unit length, and mean per squared length, of the effect of random
    directions: |g| / sqrt(D) and tr Cov_p(U) / 2D, to second order."""
    width = gradient.shape[-1]
    squares = torch.cat([rows.float().square().sum(-1) for rows in lm.unembedding.split(8192)])
    mean = lm.unembedding[tokens].float() - gradient
    spread = (logprobs.exp() @ squares - mean.square().sum(-1)).clamp_min(0)
    return torch.stack([gradient.norm(dim=-1) / width**0.5, spread / (2 * width)], dim=-1)


def _probed_sensitivity(
    decoder: SaeDecoderForCausalLM,
    latents: SparseLatents,
    resid: Tensor,
    predict: Predict,
    best: torch.return_types.max,
    gradient: Tensor,
) -> Tensor:
    """The same with blocks, whose curvature no formula gives: the mean per squared length is that
    of PROBES random directions and their opposites, as long as the active features usually are."""
    n, width = resid.shape
    lengths = decoder.W.norm(dim=-1)[latents.indices] * latents.acts
    number = (latents.acts > 0).sum(-1).clamp_min(1)
    usual = (lengths.square().sum(-1) / number).sqrt().clamp_min(TINY)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    lot = torch.randn(n, PROBES, width, generator=generator).to(resid)
    step = F.normalize(lot, dim=-1) * usual[:, None, None]
    moved = torch.cat([resid[:, None] + step, resid[:, None] - step], dim=1)
    total = resid.new_zeros(n)
    for variants in moved.split(max(1, LOGIT_ROWS // max(n, 1)), dim=1):
        after = decoder.frozen.lm.unembed(predict(variants)).log_softmax(-1)
        token = best.indices[:, None, None].expand(*after.shape[:2], 1)
        total += (best.values.detach()[:, None] - after.gather(-1, token)[..., 0]).sum(-1)
    curvature = (total / (2 * PROBES) / usual.square()).clamp_min(0)
    return torch.stack([gradient.norm(dim=-1) / width**0.5, curvature], dim=-1)


@torch.no_grad()
def measure(
    decoder: SaeDecoderForCausalLM,
    places: Places,
    candidates: Candidates,
    removals: Float[Tensor, "places interventions candidates"] | None = None,
) -> Measured:
    """Exact effects of removing each candidate alone, and of joint interventions.

    With a linear decoder, when an intervention lowers the logits by d_v, log p(token) falls by
    d_token + log sum_v p_v exp(-d_v), with p the unpatched probabilities. The change of the
    logits by one unit of a latent, W[latent] @ U.T, is made once a block of the vocabulary and
    shared by every position and intervention; no logits of a patched position are ever stored.
    With blocks every intervention is run.

    Args:
        places: N of them, unpatched.
        candidates: of the same places.
        removals: [N, M, C], the removed share of each candidate, 0 to 1.
    """
    num_places, num_candidates = candidates.acts.shape
    if removals is None:
        removals = candidates.acts.new_zeros(num_places, 0, num_candidates)
    num_joint = removals.shape[1]
    effects = candidates.acts.new_zeros(num_places, num_candidates + 2 * num_joint)
    capped = getattr(decoder.frozen.lm.model.config, "final_logit_softcapping", None)
    shared = not decoder.looks_back and capped is None
    few = max(1, LOGIT_ROWS // (num_candidates + num_joint))
    for rows, predict in at_once(decoder, places, PLACES_PER_CHUNK if shared else few):
        resid = resid_of(decoder, places.of(rows).latents)
        chunk = Candidates(*(column[rows] for column in candidates))
        doubtful = torch.arange(len(rows), device=rows.device)
        if shared:
            effects[rows] = _shared_effects(decoder, resid, chunk, removals[rows])
            doubtful = (~effects[rows].isfinite().all(-1)).nonzero()[:, 0]
        # exp(-d_v) overflows where a logit rises by more than 88 nats; a soft cap, or blocks, make
        # logits nonlinear: there every intervention is run.
        for part in doubtful.split(few):
            some = Candidates(*(column[part] for column in chunk))
            effects[rows[part]] = _run_each(
                decoder, predict, resid[part], some, removals[rows[part]]
            )
    return Measured(*effects.split([num_candidates, num_joint, num_joint], dim=1))


def _shared_effects(
    decoder: SaeDecoderForCausalLM, hidden: Tensor, chunk: Candidates, removals: Tensor
) -> Tensor:
    """[n, C + 2 M]: effects of the single removals, of the joint ones, margins of the latter."""
    lm = decoder.frozen.lm
    bias = getattr(lm.model.get_output_embeddings(), "bias", None)
    latents, slots = chunk.indices.unique(return_inverse=True)
    rows = decoder.W[latents]

    token_vectors = lm.unembedding[chunk.tokens].float()
    token_logits = (hidden * token_vectors).sum(-1)
    if bias is not None:
        token_logits = token_logits + bias.float()[chunk.tokens]
    normaliser = token_logits - chunk.logprobs

    # p of the whole vocabulary for every removal would not fit: it is summed block by block.
    sums = hidden.new_zeros(len(hidden), chunk.acts.shape[1] + removals.shape[1])
    best_other = hidden.new_full((len(hidden), removals.shape[1]), float("-inf"))
    for first in range(0, lm.vocab_size, VOCABULARY_PER_BLOCK):
        vocabulary = slice(first, first + VOCABULARY_PER_BLOCK)
        columns = lm.unembedding[vocabulary].float()
        logits = F.linear(hidden, columns, None if bias is None else bias.float()[vocabulary])
        probabilities = (logits - normaliser[:, None]).exp_()[:, :, None]
        changes = rows @ columns.T

        # The token itself is no rival of its own.
        column_of_token = chunk.tokens - first
        here = (column_of_token >= 0) & (column_of_token < len(columns))
        logits[here, column_of_token[here]] = float("-inf")

        for start in range(0, len(hidden), POSITIONS_PER_BLOCK):
            block = slice(start, start + POSITIONS_PER_BLOCK)
            lowered = changes.index_select(0, slots[block].flatten())
            lowered = lowered.view(*slots[block].shape, -1).mul_(-chunk.acts[block, :, None])
            joint = removals[block] @ lowered
            others = (joint + logits[block, None]).amax(-1)
            best_other[block] = torch.maximum(best_other[block], others)
            single_sum = lowered.exp_() @ probabilities[block]
            joint_sum = joint.exp_() @ probabilities[block]
            sums[block] += torch.cat([single_sum, joint_sum], dim=1)[..., 0]

    at_token = chunk.acts * torch.einsum("ncd,nd->nc", rows[slots], token_vectors)
    joint_at_token = torch.einsum("nmc,nc->nm", removals, at_token)
    effects = torch.cat([at_token, joint_at_token], dim=1) + sums.log()
    return torch.cat([effects, token_logits[:, None] - joint_at_token - best_other], dim=1)


def _run_each(
    decoder: SaeDecoderForCausalLM,
    predict: Predict,
    resid: Tensor,
    chunk: Candidates,
    removals: Tensor,
) -> Tensor:
    """The same [n, C + 2 M] from all logits of each intervention; `resid` is [n, D]."""
    single = torch.eye(chunk.acts.shape[1], device=resid.device).expand(len(resid), -1, -1)
    shares = torch.cat([single, removals], dim=1)
    rows = F.embedding(chunk.indices, decoder.W)
    removed = torch.einsum("nmc,ncd->nmd", shares * chunk.acts[:, None], rows)
    hidden = predict(resid[:, None] - removed)
    after = decoder.frozen.lm.unembed(hidden).log_softmax(-1)
    token = chunk.tokens[:, None, None].expand(*after.shape[:2], 1)
    mine = after.gather(-1, token)[..., 0]
    others = after.scatter(-1, token, float("-inf")).amax(-1)
    margins = (mine - others)[:, chunk.acts.shape[1] :]
    return torch.cat([chunk.logprobs[:, None] - mine, margins], dim=1)


class Outcomes(NamedTuple):
    """What interventions did to N predictions, M each."""

    effects: Tensor
    """[N, M]: log p(token) - log p(token after the intervention), nats."""
    changed: Tensor
    """[N, M] bool: the most likely token is another one now."""


@torch.no_grad()
def run_patched(
    decoder: SaeDecoderForCausalLM,
    places: Places,
    shares: Float[Tensor, "places interventions active"],
    candidates: Candidates,
) -> Outcomes:
    """Run the decoder on patched places, without the shortcuts of `measure`.

    Works for any change of activations and gives the whole distribution, at the price of the
    logits of every intervention.

    Args:
        places: N of them, unpatched.
        shares: [N, M, K], what is taken from each activation: 1 removes, 0.5 halves, -1 doubles.
        candidates: of the same places; their token and its log p are used.
    """
    num_places, num_interventions, _ = shares.shape
    effects = shares.new_zeros(num_places, num_interventions)
    changed = torch.zeros_like(effects, dtype=torch.bool)
    few = max(1, LOGIT_ROWS // max(num_interventions, 1))
    for rows, predict in at_once(decoder, places, few):
        here = places.of(rows).latents
        acts = here.acts[:, None] * (1 - shares[rows])
        patched = SparseLatents(acts, here.indices[:, None].expand_as(acts))
        hidden = predict(resid_of(decoder, patched))
        logprobs = decoder.frozen.lm.unembed(hidden).log_softmax(-1)
        token = candidates.tokens[rows, None]
        after = logprobs.gather(-1, token[..., None].expand(*acts.shape[:2], 1))[..., 0]
        effects[rows] = candidates.logprobs[rows, None] - after
        changed[rows] = logprobs.argmax(-1) != token
    return Outcomes(effects, changed)


def ablate(latents: SparseLatents, latent: Int[Tensor, " places"]) -> SparseLatents:
    """The same positions with one latent each set to zero; `latent` is [N]."""
    keep = latents.indices != latent[:, None]
    return SparseLatents(latents.acts * keep, latents.indices)


def noise_floor(
    candidates: Candidates, row_norms: Float[Tensor, "places candidates"]
) -> Float[Tensor, "places candidates"]:
    """How large an effect chance gives each candidate: [N, C], nats.

    Removing a random direction of the candidate's own length r = |act W[latent]| at the same
    position changes log p by a normal amount with standard deviation r |g| / sqrt(D) around
    r^2 tr Cov_p(U) / 2D (second order in r; g is the gradient of log p, U the unembedding). With
    blocks the mean's factor of r^2 is measured (`Candidates.sensitivity`).
    95 % of random directions stay below the sum of that mean and 1.96 deviations. A feature
    that does no more than this tells nothing about its direction.

    Args:
        row_norms: [N, C], lengths of the candidates' rows of W.
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
