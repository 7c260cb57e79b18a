"""Exact effects of removing features from the decoder: what explanations must agree with.

The effect of a feature on a prediction is log p(token) - log p(token without the feature), in
nats; positive supports the token. The decoder is linear up to its logits, so removing a share
r_j of each feature j moves the hidden state by -sum_j r_j act_j W[j], and nothing else.

Axes: N position, K active latents, C candidates (at most K), M interventions, D model width,
V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import SparseLatents

POSITIONS_PER_CHUNK = 8192
POSITIONS_PER_BLOCK = 32
VOCABULARY_PER_BLOCK = 2048
LOGIT_ROWS = 256
TWO_SIDED_95 = 1.96


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
    latents: SparseLatents,
    count: int,
    excluded: Tensor | None = None,
) -> Candidates:
    """The `count` active latents of each position with the largest |contribution|.

    Args:
        latents: acts and indices [N, K].
        count: C is the smaller of `count` and K.
        excluded: [L] bool, latents that are no candidates. They stay active in the prediction;
            a position with too few others is padded.
    """
    _check_linear(decoder)
    count = min(count, latents.acts.shape[-1])
    parts = [_candidates_of_chunk(decoder, chunk, count, excluded) for chunk in _chunks(latents)]
    return Candidates(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _candidates_of_chunk(
    decoder: SaeDecoderForCausalLM, latents: SparseLatents, count: int, excluded: Tensor | None
) -> Candidates:
    lm = decoder.frozen.lm
    with torch.enable_grad():
        hidden = decoder.hidden(latents).detach().requires_grad_()
        logprobs = lm.unembed(hidden).log_softmax(-1)
        best = logprobs.max(-1)
        (gradient,) = torch.autograd.grad(best.values.sum(), hidden)
    with torch.no_grad():
        contributions = decoder.contributions(latents, best.indices)
        rows = F.embedding(latents.indices, decoder.W)
        attributions = latents.acts * torch.einsum("nkd,nd->nk", rows, gradient)
        acts = latents.acts
        if excluded is not None:
            allowed = ~excluded[latents.indices]
            acts, contributions, attributions = (
                column * allowed for column in (acts, contributions, attributions)
            )
        chosen = contributions.abs().topk(count, dim=-1).indices
    return Candidates(
        best.indices,
        best.values.detach(),
        acts.gather(-1, chosen),
        latents.indices.gather(-1, chosen),
        contributions.gather(-1, chosen),
        attributions.gather(-1, chosen),
        _sensitivity(lm, logprobs.detach(), best.indices, gradient),
    )


def _sensitivity(lm: FrozenLM, logprobs: Tensor, tokens: Tensor, gradient: Tensor) -> Tensor:
    """Standard deviation per unit length, and mean per squared length, of the effect of random
    directions: |g| / sqrt(D) and tr Cov_p(U) / 2D, to second order."""
    width = gradient.shape[-1]
    squares = torch.cat([rows.float().square().sum(-1) for rows in lm.unembedding.split(8192)])
    mean = lm.unembedding[tokens].float() - gradient
    spread = (logprobs.exp() @ squares - mean.square().sum(-1)).clamp_min(0)
    return torch.stack([gradient.norm(dim=-1) / width**0.5, spread / (2 * width)], dim=-1)


@torch.no_grad()
def measure(
    decoder: SaeDecoderForCausalLM,
    latents: SparseLatents,
    candidates: Candidates,
    removals: Tensor | None = None,
) -> Measured:
    """Exact effects of removing each candidate alone, and of joint interventions.

    When an intervention lowers the logits by d_v, log p(token) falls by
    d_token + log sum_v p_v exp(-d_v), with p the unpatched probabilities. The change of the
    logits by one unit of a latent, W[latent] @ U.T, is made once a block of the vocabulary and
    shared by every position and intervention; no logits of a patched position are ever stored.

    Args:
        latents: acts and indices [N, K], the unpatched positions.
        candidates: of the same positions.
        removals: [N, M, C], the removed share of each candidate, 0 to 1.
    """
    _check_linear(decoder)
    num_positions, num_candidates = candidates.acts.shape
    if removals is None:
        removals = candidates.acts.new_zeros(num_positions, 0, num_candidates)
    found = []
    for start in range(0, num_positions, POSITIONS_PER_CHUNK):
        part = slice(start, start + POSITIONS_PER_CHUNK)
        hidden = decoder.hidden(SparseLatents(latents.acts[part], latents.indices[part]))
        chunk = Candidates(*(column[part] for column in candidates))
        capped = getattr(decoder.frozen.lm.model.config, "final_logit_softcapping", None)
        if capped is None:
            effects = _shared_effects(decoder, hidden, chunk, removals[part])
            doubtful = ~effects.isfinite().all(-1)
        else:
            effects = hidden.new_zeros(len(hidden), num_candidates + 2 * removals.shape[1])
            doubtful = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        # exp(-d_v) overflows where a logit rises by more than 88 nats, and a soft cap makes
        # logits nonlinear: such positions are run one intervention at a time.
        for row in doubtful.nonzero()[:, 0].tolist():
            one = Candidates(*(column[row : row + 1] for column in chunk))
            effects[row] = _direct_effects(decoder, hidden[row], one, removals[start + row])
        found.append(effects)
    effects = torch.cat(found)
    num_joint = removals.shape[1]
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
    sums = hidden.new_zeros(len(hidden), chunk.acts.shape[1] + removals.shape[1])
    best_other = hidden.new_full((len(hidden), removals.shape[1]), float("-inf"))
    for first in range(0, lm.vocab_size, VOCABULARY_PER_BLOCK):
        vocabulary = slice(first, first + VOCABULARY_PER_BLOCK)
        columns = lm.unembedding[vocabulary].float()
        logits = F.linear(hidden, columns, None if bias is None else bias.float()[vocabulary])
        probabilities = (logits - normaliser[:, None]).exp_()[:, :, None]
        changes = rows @ columns.T
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


def _direct_effects(
    decoder: SaeDecoderForCausalLM, hidden: Tensor, one: Candidates, removals: Tensor
) -> Tensor:
    """The same [C + 2 M] for one position ([D], and [M, C]), from all logits of each."""
    lm = decoder.frozen.lm
    shares = torch.cat([torch.eye(one.acts.shape[1], device=hidden.device), removals])
    removed = (shares * one.acts) @ F.embedding(one.indices[0], decoder.W)
    token = int(one.tokens)
    effects, margins = [], []
    for part in removed.split(8):
        after = lm.unembed(hidden - part).log_softmax(-1)
        effects.append(one.logprobs - after[:, token])
        mine = after[:, token].clone()
        after[:, token] = float("-inf")
        margins.append(mine - after.amax(-1))
    return torch.cat([*effects, torch.cat(margins)[one.acts.shape[1] :]])


class Outcomes(NamedTuple):
    """What interventions did to N predictions, M each."""

    effects: Tensor
    """[N, M]: log p(token) - log p(token after the intervention), nats."""
    changed: Tensor
    """[N, M] bool: the most likely token is another one now."""


@torch.no_grad()
def run_patched(
    decoder: SaeDecoderForCausalLM, latents: SparseLatents, shares: Tensor, candidates: Candidates
) -> Outcomes:
    """Run the decoder on patched positions, without the shortcuts of `measure`.

    Works for any change of activations and gives the whole distribution, at the price of the
    logits of every intervention.

    Args:
        latents: acts and indices [N, K].
        shares: [N, M, K], what is taken from each activation: 1 removes, 0.5 halves, -1 doubles.
        candidates: of the same positions; their token and its log p are used.
    """
    num_positions, num_interventions, _ = shares.shape
    effects = shares.new_zeros(num_positions, num_interventions)
    changed = torch.zeros_like(effects, dtype=torch.bool)
    block = max(1, LOGIT_ROWS // max(num_interventions, 1))
    for start in range(0, num_positions, block):
        rows = slice(start, start + block)
        acts = latents.acts[rows, None] * (1 - shares[rows])
        indices = latents.indices[rows, None].expand_as(acts)
        flat = SparseLatents(acts.flatten(0, 1), indices.flatten(0, 1))
        logprobs = decoder.logits(flat).log_softmax(-1).unflatten(0, acts.shape[:2])
        token = candidates.tokens[rows, None]
        after = logprobs.gather(-1, token[..., None].expand(*acts.shape[:2], 1))[..., 0]
        effects[rows] = candidates.logprobs[rows, None] - after
        changed[rows] = logprobs.argmax(-1) != token
    return Outcomes(effects, changed)


def ablate(latents: SparseLatents, latent: Tensor) -> SparseLatents:
    """The same positions with one latent each set to zero; `latent` is [N]."""
    keep = latents.indices != latent[:, None]
    return SparseLatents(latents.acts * keep, latents.indices)


def noise_floor(candidates: Candidates, row_norms: Tensor) -> Tensor:
    """How large an effect chance gives each candidate: [N, C], nats.

    Removing a random direction of the candidate's own length r = |act W[latent]| at the same
    position changes log p by a normal amount with standard deviation r |g| / sqrt(D) around
    r^2 tr Cov_p(U) / 2D (second order in r; g is the gradient of log p, U the unembedding).
    95 % of random directions stay below the sum of that mean and 1.96 deviations. A feature
    that does no more than this tells nothing about its direction.

    Args:
        row_norms: [N, C], lengths of the candidates' rows of W.
    """
    length = row_norms * candidates.acts
    deviation, mean = candidates.sensitivity[:, None].unbind(-1)
    return TWO_SIDED_95 * length * deviation + length.square() * mean


def random_removals(
    acts: Tensor, count: int, generator: torch.Generator, share: float = 1.0
) -> Tensor:
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


def _chunks(latents: SparseLatents) -> list[SparseLatents]:
    return [
        SparseLatents(acts, indices)
        for acts, indices in zip(
            latents.acts.split(LOGIT_ROWS),
            latents.indices.split(LOGIT_ROWS),
            strict=True,
        )
    ]


def _check_linear(decoder: SaeDecoderForCausalLM) -> None:
    if decoder.config.kind != "linear":
        raise BadInputError(
            f"Exact patching does not know decoders of kind {decoder.config.kind!r}.",
            "It relies on the hidden state being a sum over features.",
            "Explain with a linear decoder.",
        )
