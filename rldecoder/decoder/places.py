"""Predictions at chosen positions, made again with other latents there and nothing else changed.

A linear decoder reads one position, so the latents of that position are all there is. One with
blocks looks back: the positions before are run once with a key-value cache, and every variant of
a position is one more token that sees what came before it and itself, and no other variant.

Axes: N place, S sequence, T position, K active latents, D model width, m variants of a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.reader import Reader, proven_masks
from rldecoder.errors import BadInputError
from rldecoder.sae.selection import SparseLatents
from rldecoder.sae.sparse_ops import decode_sparse

Predict = Callable[[Tensor], Tensor]
"""What stands at the door of the decoder in n places, m variants each, [n, m, D], to predicted
final hidden states [n, m, D]; differentiable."""


class Past(NamedTuple):
    """The sequences that places lie in."""

    latents: SparseLatents
    """[S, T, K] from position 0 on; act 0 where nothing is read."""
    visible: Tensor
    """[S, T] bool: positions that later ones may look at (no padding, no sink but position 0)."""
    sequence: Tensor
    """[N] int64: which one each place is in."""
    position: Tensor
    """[N] int64: where in it, from 1 on."""


class Places(NamedTuple):
    """N positions whose predictions are looked at."""

    latents: SparseLatents
    """[N, K] active there."""
    past: Past | None = None
    """What came before; a linear decoder does not read it."""

    def of(self, chosen: Shaped[Tensor, " some"] | slice) -> Places:
        """Only some places: an index or a mask over N."""
        past = self.past
        if past is not None:
            past = past._replace(sequence=past.sequence[chosen], position=past.position[chosen])
        return Places(self.latents.of(chosen), past)


def at_once(
    decoder: SaeDecoderForCausalLM, places: Places, size: int
) -> Iterator[tuple[Int[Tensor, " places"], Predict]]:
    """Groups of at most `size` places, as an ascending index [n], and how to predict in them.

    Every place comes once. With blocks, the places of a group are in one sequence.

    Raises:
        BadInputError: the decoder has blocks and the places have no past, or its blocks cannot
            be read place by place.
    """
    everything = torch.arange(len(places.latents.acts), device=places.latents.acts.device)
    if not decoder.looks_back:
        for rows in everything.split(size):
            yield rows, lambda resid: resid
        return
    past = places.past
    if past is None:
        raise BadInputError(
            "The decoder has blocks, and nothing is known of the text before its predictions.",
            "Such a decoder looks back over the latents of earlier positions.",
            "Make the places from whole sequences.",
        )
    for sequence in past.sequence.unique().tolist():
        inside = everything[past.sequence == sequence]
        # What a place sees lies before it; the last one's own column is never looked at.
        last = int(past.position[inside].max())
        acts, indices = past.latents
        before = SparseLatents(acts[sequence, None, :last], indices[sequence, None, :last])
        with torch.no_grad():
            resid = resid_of(decoder, before)
        masks = proven_masks(decoder.blocks, last + 1)
        reader = Reader(decoder.blocks, resid, past.visible[sequence, :last], masks)
        for rows in inside.split(size):
            yield rows, partial(reader.read, position=past.position[rows])


def resid_of(
    decoder: SaeDecoderForCausalLM, latents: SparseLatents
) -> Float[Tensor, "*places d_model"]:
    """What latents [..., K] add up to at the door of the decoder: [..., D]."""
    return decode_sparse(latents, decoder.W, decoder.b)


def past_of_prompts(latents: SparseLatents, mask: Shaped[Tensor, "sequences length"]) -> Past:
    """The past of the last position of prompts that are padded on the left.

    Args:
        latents: [S, T, K].
        mask: [S, T], 0 for padding.
    """
    lengths = mask.sum(-1)
    # Padding goes to the right: positions are counted from the first token.
    order = (torch.arange(mask.shape[1], device=mask.device) - lengths[:, None]) % mask.shape[1]
    acts, indices = (column.gather(1, order[..., None].expand_as(column)) for column in latents)
    visible = mask.gather(1, order).bool()
    rows = torch.arange(len(mask), device=mask.device)
    return Past(SparseLatents(acts * visible[..., None], indices), visible, rows, lengths - 1)


def last_of_text(latents: SparseLatents) -> Places:
    """The last position of one text whose latents are [T, K]."""
    length, device = len(latents.acts), latents.acts.device
    visible = torch.ones(1, length, dtype=torch.bool, device=device)
    first = torch.zeros(1, dtype=torch.long, device=device)
    past = Past(latents.of(None), visible, first, first + length - 1)
    return Places(latents.of(slice(-1, None)), past)


def past_of_rows(
    latents: SparseLatents,
    seq_id: Int[Tensor, " tokens"],
    pos: Int[Tensor, " tokens"],
    wanted_seq: Int[Tensor, " places"],
    wanted_pos: Int[Tensor, " places"],
) -> Past:
    """The past of places in cached text.

    Args:
        latents: [n, K], cached rows of the sequences that the places lie in.
        seq_id, pos: [n] of those rows.
        wanted_seq, wanted_pos: [N] of the places.
    """
    names, sequence = wanted_seq.unique(return_inverse=True)
    row = torch.searchsorted(names, seq_id.contiguous())
    acts, indices = latents
    shape = (len(names), int(pos.max()) + 1)
    grid = SparseLatents(
        acts.new_zeros(*shape, acts.shape[1]).index_put((row, pos), acts),
        indices.new_zeros(*shape, acts.shape[1]).index_put((row, pos), indices),
    )
    visible = torch.zeros(shape, dtype=torch.bool, device=acts.device)
    visible[row, pos] = True
    visible[:, 0] = True
    return Past(grid, visible, sequence, wanted_pos)


def join_pasts(parts: Sequence[Past]) -> Past:
    """Places of several origins one after the other."""
    length = max(part.visible.shape[1] for part in parts)
    width = max(part.latents.acts.shape[2] for part in parts)

    def padded(column: Tensor) -> Tensor:
        return F.pad(column, (0, width - column.shape[2], 0, length - column.shape[1]))

    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part.visible))
    return Past(
        SparseLatents(
            torch.cat([padded(part.latents.acts) for part in parts]),
            torch.cat([padded(part.latents.indices) for part in parts]),
        ),
        torch.cat([F.pad(part.visible, (0, length - part.visible.shape[1])) for part in parts]),
        torch.cat([p.sequence + offset for p, offset in zip(parts, offsets[:-1], strict=True)]),
        torch.cat([part.position for part in parts]),
    )
