"""What the decoder predicts in the states of a rollout, from cached latents alone.

A linear decoder needs each token's own latents. One with blocks looks back: it is run over prompt
and response, and the prefix that the prompts of a task share is run for one row only, gradients
included.

Axes: B rollout, T response token, N response tokens of some rollouts (row by row, padding left
out), K active latents, D model width, P prefix, S rest of the prompt.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from rldecoder.decoder.blocks import plain_attention
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.rl.rollout import Context, Rollout
from rldecoder.sae.selection import SparseLatents
from rldecoder.sae.sparse_ops import decode_sparse

Contributions = Literal["none", "values", "differentiable"]


class Predicted(NamedTuple):
    """The decoder in N states."""

    hidden: Tensor
    """[N, D]"""
    contributions: Tensor | None
    """[N, K], what each latent adds to the chosen logit; None unless asked for."""


def predict(
    decoder: SaeDecoderForCausalLM,
    rollout: Rollout,
    rows: Tensor,
    *,
    contributions: Contributions = "none",
) -> Predicted:
    """Predicted final hidden states of the response tokens of some rollouts.

    Contributions are exact for `linear`. With blocks a latent also acts on later tokens: then they
    are activation x gradient of the sum of the response's chosen logits (caps of logits left
    out), the first-order effect on this choice and on those after it.

    Args:
        decoder: need not be the one that sampled.
        rollout: with contexts, if the decoder has blocks.
        rows: [b] ascending numbers of rollouts.
        contributions: none, without gradient, or with gradient to the decoder's weights.
    """
    keep = rollout.mask[rows].bool()
    acts, indices = rollout.latents.acts[rows][keep], rollout.latents.indices[rows][keep]
    if decoder.blocks is None:
        latents, found = SparseLatents(acts, indices), None
        if contributions != "none":
            found = decoder.contributions(latents, rollout.token_ids[rows][keep])
        return Predicted(decoder.hidden(latents), found)
    hidden = torch.zeros(*keep.shape, decoder.config.d_model, device=keep.device)
    slopes = torch.zeros_like(hidden)
    for context in rollout.contexts:
        inside = torch.isin(context.rows, rows)
        if not inside.any():
            continue
        mine = context.rows[inside]
        length = int(rollout.mask[mine].sum(-1).max())
        place = torch.searchsorted(rows, mine)
        found_hidden, found_slopes = _through_blocks(
            decoder, rollout, context, inside, mine, length, contributions
        )
        hidden[place, :length] = found_hidden
        if found_slopes is not None:
            slopes[place, :length] = found_slopes
    if contributions == "none":
        return Predicted(hidden[keep], None)
    read = torch.einsum("nkd,nd->nk", F.embedding(indices, decoder.W), slopes[keep])
    return Predicted(hidden[keep], acts * read)


def _through_blocks(
    decoder: SaeDecoderForCausalLM,
    rollout: Rollout,
    context: Context,
    inside: Tensor,
    mine: Tensor,
    length: int,
    contributions: Contributions,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [b, length, D] of rows of one context; slopes of the chosen logits' sum."""
    blocks = decoder.blocks
    assert blocks is not None
    suffix = SparseLatents(context.suffix.acts[inside], context.suffix.indices[inside])
    width = suffix.acts.shape[1]
    # The response's first token is chosen in the state of the prompt's last.
    states = _joined(suffix, _cut(rollout.latents, mine, 1, length))
    positions = context.positions[inside]
    steps = torch.arange(1, length, device=positions.device)
    cache = DynamicCache()
    with torch.set_grad_enabled(torch.is_grad_enabled() or contributions == "values"):
        with plain_attention():
            if context.prefix is not None:
                blocks(decode_sparse(context.prefix, decoder.W, decoder.b), past_key_values=cache)
                cache.batch_repeat_interleave(len(mine))
            resid = decode_sparse(states, decoder.W, decoder.b)
            if contributions == "values":
                resid = resid.detach().requires_grad_()
            hidden = blocks(
                resid,
                attention_mask=F.pad(context.mask[inside], (0, length - 1), value=1),
                position_ids=torch.cat([positions, positions[:, -1:] + steps], dim=1),
                past_key_values=cache,
            )[:, width - 1 :]
        if contributions == "none":
            return hidden, None
        tokens, mask = rollout.token_ids[mine, :length], rollout.mask[mine, :length]
        directions = decoder.frozen.lm.unembedding[tokens].to(hidden.dtype)
        (slopes,) = torch.autograd.grad(
            (hidden * directions * mask[..., None]).sum(),
            resid,
            create_graph=contributions == "differentiable",
        )
    slopes = slopes[:, width - 1 :]
    return (hidden, slopes) if contributions == "differentiable" else (hidden.detach(), slopes)


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
