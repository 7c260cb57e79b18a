"""Where a decoder with blocks starts: the frozen model's own blocks, joined in closed form.

The maps are fitted one after the other, each on what really arrives at its place: the SAE's
reconstruction, then what the blocks kept so far make of it. So every map also corrects, as far as
an affine map can, the errors made before it. No gradient step is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.decoder.reader import proven_masks
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.lens import RIDGE_STRENGTHS, AffineMap, Moments, choose_affine
from rldecoder.lm.sinks import is_sink
from rldecoder.sae.model import Sae

Init = Literal["base", "fresh"]
HELD_OUT = 8
"""Every so many-th sequence chooses the ridge strengths and is not fitted."""
MICRO_BATCH = 8
"""Sequences a pass."""


class _Text(NamedTuple):
    """What the frozen model makes of the fitting text, [S, T, D] each, in its dtype."""

    recon: Tensor
    """The SAE's reconstruction at the hook layer."""
    doors: list[Tensor]
    """The residual stream at the door of each kept block."""
    final: Tensor
    """The final hidden state."""
    usual: Tensor
    """[S, T] bool: neither position 0 nor another sink."""


@torch.no_grad()
def decoder_from_blocks(
    lm: FrozenLM,
    sae: Sae,
    blocks: Sequence[int],
    input_ids: Int[Tensor, "sequences length"],
    *,
    init: Init = "base",
    advance: Callable[[int], None] = lambda tokens: None,
) -> SaeDecoderForCausalLM:
    """A transformer decoder that has been fitted, but not trained.

    Args:
        lm: the frozen model.
        sae: at the hook layer.
        blocks: numbers of the kept blocks.
        input_ids: [S, T] training text, 8 sequences or more.
        init: `base` copies the frozen model's blocks; `fresh` leaves them as transformers makes
            them (global RNG), and then only the last map is fitted.
        advance: called with the tokens of each pass.

    Raises:
        BadInputError: there are too few sequences to fit and to choose on, or the model's blocks
            cannot be copied or read position by position.
    """
    if len(input_ids) < HELD_OUT:
        raise BadInputError(
            f"There are {len(input_ids)} training sequences to fit the decoder's maps on.",
            f"{HELD_OUT} are the least: one of them chooses the ridge strength.",
            "Raise `ingest.budget_tokens.train`, or set `train_decoder.depth: 0`.",
        )

    decoder = new_decoder(lm, sae, blocks)
    parts = decoder.blocks
    proven_masks(parts, input_ids.shape[1])  # before hours of training

    text = _read(lm, sae, blocks, input_ids, advance)
    for sink, door in zip(parts.sinks, text.doors, strict=True):
        sink.copy_(door[:, 0].float().mean(0))
    decoder.W.copy_(sae.W_dec.float())
    decoder.b.copy_(sae.b_dec.float())

    # Each map is fitted on what really arrives at it, so that it also mends what came before.
    if init == "base":
        parts.copy_from(lm.base, input_ids[:1])
        entry = _fit(text.recon, text.doors[0], text.usual)
        decoder.W.copy_(decoder.W @ entry.A)
        decoder.b.copy_(decoder.b @ entry.A + entry.c)
        resid = entry(text.recon).to(text.recon.dtype)
        for index in range(len(parts.numbers)):
            if index:
                found = _fit(resid, text.doors[index], text.usual)
                _write(parts.bridges[index - 1], found)
                resid = found(resid).to(resid.dtype)
            resid = _in_parts(partial(parts.run_block, index), resid)
        predicted = _in_parts(parts.norm, resid)
    else:
        predicted = _in_parts(parts, text.recon)

    _write(parts.out, _fit(predicted, text.final, text.usual))
    return decoder


def _read(
    lm: FrozenLM, sae: Sae, blocks: Sequence[int], input_ids: Tensor, advance: Callable[[int], None]
) -> _Text:
    recons, doors, finals, usual = [], [], [], []
    for ids in input_ids.split(MICRO_BATCH):
        seen, final = lm.residuals(ids.to(lm.device))
        resid = seen[sae.spec.hook_layer]
        recons.append(sae(resid.flatten(0, 1).float()).recon.view_as(resid).to(lm.dtype))
        doors.append(torch.stack([seen[number] for number in blocks]))
        finals.append(final)
        sinks = is_sink(resid.flatten(0, 1), ids.to(lm.device).flatten(), lm.front)
        kept = ~sinks.view(resid.shape[:2])
        kept[:, 0] = False
        usual.append(kept)
        advance(ids.numel())
    return _Text(
        torch.cat(recons), list(torch.cat(doors, dim=1)), torch.cat(finals), torch.cat(usual)
    )


def _in_parts(function: Callable[[Tensor], Tensor], resid: Tensor) -> Tensor:
    """`function` of sequences [S, T, D], a few at a time."""
    passes = [function(part.float()) for part in resid.split(MICRO_BATCH)]
    return torch.cat(passes).to(resid.dtype)


def _fit(x: Tensor, y: Tensor, usual: Tensor) -> AffineMap:
    """The affine map [S, T, D] -> [S, T, D] on the usual tokens."""
    held = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    sums = []
    for rows in (~held, held):
        moments = Moments(x.shape[-1], x.device)
        for one_x, one_y, kept in zip(x[rows], y[rows], usual[rows], strict=True):
            moments.add(one_x[kept], one_y[kept])
        sums.append(moments)
    return choose_affine(sums[0], sums[1], RIDGE_STRENGTHS)


def _write(linear: nn.Module, found: AffineMap) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight.copy_(found.A.T)
    linear.bias.copy_(found.c)
