"""The blocks with the beginning of one sequence in their cache, and the proof that this is exact.

Every variant of a position is one more token, which sees what came before it and itself, and no
other variant. What came before is what the model's own mask of a whole sequence shows, block by
block: all of it, a window, a chunk.

Axes: T position, D model width, n places, m variants of a place, S cached and new positions.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from rldecoder.decoder.blocks import BlockDecoder
from rldecoder.decoder.distill import matmul_precision
from rldecoder.errors import BadInputError
from rldecoder.lm.masks import allowed_by, seen_masks
from rldecoder.lm.specs import stated_context_length
from rldecoder.seeds import torch_generator

_LEAST = 64
"""Positions that masks are made and proven for at least, so that few texts need longer ones."""
_COMPARED = 12
"""Positions of a proof."""
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE_ROUNDING = 5e-2


class Reader:
    """Reads places of one sequence."""

    def __init__(
        self,
        blocks: BlockDecoder,
        resid: Float[Tensor, "1 length d_model"],
        visible: Bool[Tensor, " length"],
        masks: tuple[Bool[Tensor, "seen seen"], ...],
    ) -> None:
        """Run the sequence's beginning.

        Args:
            resid: [1, T, D] at the door of the first block, from position 0 on.
            visible: [T] bool, positions that later ones may look at.
            masks: of `proven_masks`, for T + 1 positions or more.
        """
        self._blocks, self._visible, self._masks = blocks, visible, masks
        self._cache = DynamicCache()
        with torch.no_grad():
            blocks(
                resid,
                attention_mask=visible[None].long(),
                position_ids=torch.arange(len(visible), device=visible.device)[None],
                past_key_values=self._cache,
            )

    def read(
        self, resid: Float[Tensor, "places variants d_model"], position: Int[Tensor, " places"]
    ) -> Float[Tensor, "places variants d_model"]:
        """Predicted final hidden states [n, m, D] of variants at positions [n]; differentiable.

        Args:
            resid: [n, m, D] at the door of the first block.
            position: [n], 1 to T.
        """
        place = position.repeat_interleave(resid.shape[1])
        columns = torch.arange(len(self._visible), device=place.device)
        before = (columns < place[:, None]) & self._visible
        itself = torch.eye(len(place), dtype=torch.bool, device=place.device)
        added: dict[int, Tensor] = {}
        for own in self._masks:
            if id(own) in added:  # blocks of one kind share a mask
                continue
            allowed = torch.cat([before & own[place, : len(columns)], itself], dim=1)
            mask = torch.zeros(allowed.shape, dtype=resid.dtype, device=place.device)
            mask = mask.masked_fill(~allowed, torch.finfo(resid.dtype).min)
            added[id(own)] = mask[None, None]
        hidden: Tensor = self._blocks(
            resid.flatten(0, 1)[None],
            position_ids=place[None],
            past_key_values=copy.deepcopy(self._cache),
            masks=[added[id(own)] for own in self._masks],
        )
        return hidden[0].unflatten(0, resid.shape[:2])


def proven_masks(blocks: BlockDecoder, length: int) -> tuple[Bool[Tensor, "seen seen"], ...]:
    """What each block lets each of `length` positions or more look at: [T, T] bool a block.

    The first time, and whenever longer ones are needed, places of a random sequence are compared
    with that sequence run as a whole.

    Raises:
        BadInputError: they differ: these blocks cannot be read place by place.
    """
    kept = blocks.proven_masks
    if kept and len(kept[0]) >= length and kept[0].device == blocks.sinks.device:
        return kept
    most = stated_context_length(blocks.body.config)
    wanted = max(_LEAST, 1 << (length - 1).bit_length())
    size = wanted if most is None else max(length, min(wanted, most))
    training = blocks.training
    blocks.eval()
    try:
        with matmul_precision("highest"):
            blocks.proven_masks = _prove(blocks, size)
    except torch.OutOfMemoryError:
        raise
    # A model that cannot take such a mask says so in its own words.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(blocks, f"They fail on such a position: {error}".splitlines()[0]) from error
    finally:
        blocks.train(training)
    return blocks.proven_masks


@torch.no_grad()
def _prove(blocks: BlockDecoder, length: int) -> tuple[Tensor, ...]:
    device, dtype = blocks.sinks.device, blocks.sinks.dtype
    generator = torch_generator(0, "places")
    resid, other = (
        torch.randn(1, length, blocks.sinks.shape[1], generator=generator).to(device, dtype)
        for _ in range(2)
    )
    with seen_masks(blocks.blocks) as seen:
        blocks(resid)
    named: dict[int, Tensor] = {}
    for mask in seen:
        named.setdefault(id(mask), allowed_by(mask, length, device))
    masks = tuple(named[id(mask)] for mask in seen)

    # One position is hidden, as sinks are.
    visible = torch.ones(length, dtype=torch.bool, device=device)
    visible[1] = False
    whole = blocks(
        resid,
        attention_mask=visible[None].long(),
        position_ids=torch.arange(length, device=device)[None],
    )[0]
    reader = Reader(blocks, resid[:, :-1], visible[:-1], masks)
    places = torch.linspace(2, length - 1, _COMPARED, device=device).long()
    variants = torch.stack([other[0, places], resid[0, places]], dim=1)
    alone = reader.read(variants, places)[:, 1]
    off = float(((alone - whole[places]).norm(dim=-1) / whole[places].norm(dim=-1)).max())
    if not off <= _ROUNDING.get(dtype, _COARSE_ROUNDING):
        raise _refusal(
            blocks, f"Beside the same position in a whole sequence it is off by {off:.2g} of it."
        )
    return masks


def _refusal(blocks: BlockDecoder, why: str) -> BadInputError:
    return BadInputError(
        f"Blocks of type {blocks.body.config.model_type!r} cannot be read position by position.",
        why,
        "Labels, importance and explanations need that: set `train_decoder.depth: 0` and "
        "`frontier.depths: [0]`, or use another model.",
    )
