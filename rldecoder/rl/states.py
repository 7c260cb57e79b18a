"""What the decoder predicts in the states of a rollout, from cached latents alone.

A linear decoder needs each token's own latents. One with blocks looks back: it is run over prompt
and response, and the prefix that the prompts of a task share is run for one row only, gradients
included.

Axes: B rollout, T response token, N response tokens of some rollouts (row by row, padding left
out), K active latents, D model width, P prefix, S rest of the prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from rldecoder.decoder.blocks import plain_attention
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.rl.rollout import Context, Rollout
from rldecoder.sae.selection import SparseLatents
from rldecoder.sae.sparse_ops import decode_sparse


class Predicted(NamedTuple):
    """The decoder in N states."""

    hidden: Tensor
    """[N, D] predicted final hidden states."""
    slopes: Tensor | None
    """[N, D], what a step along the residual that the latents add up to gives the chosen logit;
    without gradient, None unless asked for."""


def predict(
    decoder: SaeDecoderForCausalLM,
    rollout: Rollout,
    rows: Int[Tensor, " some"],
    *,
    slopes: bool = False,
) -> Predicted:
    """Predicted final hidden states of the response tokens of some rollouts.

    The slope is the chosen token's direction (`FrozenLM.choice_directions`) for `linear`. With
    blocks a latent also acts on later tokens: then it is the gradient of the sum of the response's
    chosen logits, each above the mean logit (caps of logits left out), the first-order effect on
    this choice and on those after it.

    Args:
        decoder: need not be the one that sampled.
        rollout: with contexts, if the decoder has blocks.
        rows: [b] ascending numbers of rollouts.
        slopes: whether they are wanted. `decoder.along(latents, slopes)` is then what each latent
            adds to the chosen logit: exact for `linear`, first-order with blocks. As a loss it
            changes what latents write and not how the blocks read it: second derivatives through
            the blocks would make a PPO step much dearer.
    """
    keep = rollout.mask[rows].bool()
    if not decoder.looks_back:
        latents = SparseLatents(
            rollout.latents.acts[rows][keep], rollout.latents.indices[rows][keep]
        )
        directions = None
        if slopes:
            directions = _directions(decoder, rollout.token_ids[rows][keep])
        return Predicted(decoder.hidden(latents), directions)
    hidden = torch.zeros(*keep.shape, decoder.config.d_model, device=keep.device)
    slope = torch.zeros_like(hidden)
    for context in rollout.contexts:
        inside = torch.isin(context.rows, rows)
        if not inside.any():
            continue
        mine = context.rows[inside]
        length = int(rollout.mask[mine].sum(-1).max())
        place = torch.searchsorted(rows, mine)
        parts = _through_blocks(decoder, rollout, context, inside, length, slopes=slopes)
        hidden[place, :length] = parts.hidden
        if parts.slopes is not None:
            slope[place, :length] = parts.slopes
    return Predicted(hidden[keep], slope[keep] if slopes else None)


def _directions(decoder: SaeDecoderForCausalLM, token_ids: Tensor) -> Tensor:
    return decoder.frozen.lm.choice_directions(token_ids).to(decoder.W.dtype)


def _through_blocks(
    decoder: SaeDecoderForCausalLM,
    rollout: Rollout,
    context: Context,
    inside: Tensor,
    length: int,
    *,
    slopes: bool,
) -> Predicted:
    """The first `length` states of the rows of a context that are `inside`: [b, length, D]."""
    blocks = decoder.blocks
    mine = context.rows[inside]
    suffix = SparseLatents(context.suffix.acts[inside], context.suffix.indices[inside])
    width = suffix.acts.shape[1]

    # The response's first token is chosen in the state of the prompt's last.
    states = _joined(suffix, _cut(rollout.latents, mine, 1, length))
    positions = context.positions[inside]
    steps = torch.arange(1, length, device=positions.device)

    cache = DynamicCache()
    with plain_attention():
        if context.prefix is not None:
            blocks(decode_sparse(context.prefix, decoder.W, decoder.b), past_key_values=cache)
            cache.batch_repeat_interleave(len(mine))

        resid = decode_sparse(states, decoder.W, decoder.b)
        with torch.set_grad_enabled(slopes or torch.is_grad_enabled()):
            if slopes:
                resid = resid.detach().requires_grad_()
            hidden = blocks(
                resid,
                attention_mask=F.pad(context.mask[inside], (0, length - 1), value=1),
                position_ids=torch.cat([positions, positions[:, -1:] + steps], dim=1),
                past_key_values=cache,
            )[:, width - 1 :]
            if not slopes:
                return Predicted(hidden, None)

            mask = rollout.mask[mine, :length, None]
            directions = _directions(decoder, rollout.token_ids[mine, :length])
            (slope,) = torch.autograd.grad((hidden * directions * mask).sum(), resid)
    return Predicted(hidden.detach(), slope[:, width - 1 :])


def _cut(latents: SparseLatents, rows: Tensor, start: int, stop: int) -> SparseLatents:
    return SparseLatents(latents.acts[rows, start:stop], latents.indices[rows, start:stop])


def _joined(first: SparseLatents, second: SparseLatents) -> SparseLatents:
    """Both along T; the narrower one gets latents of activation 0."""
    width = max(first.acts.shape[-1], second.acts.shape[-1])
    parts = [
        [F.pad(part, (0, width - part.shape[-1])) for part in (latents.acts, latents.indices)]
        for latents in (first, second)
    ]
    return SparseLatents(*(torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)))
