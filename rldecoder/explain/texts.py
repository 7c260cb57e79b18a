"""The texts that predictions are made in, as the frozen model's residual streams.

An effect in the frozen model needs what came before its place: the blocks above the hook layer
look back at it. A text is kept from its first token to its last place.

Axes: N place, T position, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from rldecoder.data.activations import ActivationBatch
from rldecoder.lm.frozen import FrozenLM


class Texts(NamedTuple):
    """N places in some texts."""

    resid: tuple[Tensor, ...]
    """Of each text [T, D], at the hook layer, from position 0 on."""
    text: Tensor
    """[N] int64: which one each place is in."""
    position: Tensor
    """[N] int64: where in it."""

    def of(self, chosen: Tensor | slice) -> Texts:
        """Only some places: an index or a mask over N."""
        return self._replace(text=self.text[chosen], position=self.position[chosen])


def join_texts(parts: Sequence[Texts]) -> Texts:
    """Places of several origins one after the other."""
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part.resid))
    return Texts(
        tuple(resid for part in parts for resid in part.resid),
        torch.cat([part.text + offset for part, offset in zip(parts, offsets[:-1], strict=True)]),
        torch.cat([part.position for part in parts]),
    )


def last_of(resid: Tensor) -> Texts:
    """The last position of one text [T, D]."""
    first = torch.zeros(1, dtype=torch.long, device=resid.device)
    return Texts((resid,), first, first + len(resid) - 1)


def texts_of_rows(
    lm: FrozenLM,
    layer: int,
    rows: ActivationBatch,
    tokens: NDArray[Any],
    seq_id: Tensor,
    pos: Tensor,
) -> Texts:
    """Places in cached text.

    A cache leaves attention sinks out, which later positions look at all the same: the frozen
    model makes them again, from the beginning of their sequence.

    Args:
        rows: all cached rows of the sequences that the places lie in.
        tokens: [S, T] of the split; row number is `seq_id`.
        seq_id, pos: [N] of the places.
    """
    assert rows.resid is not None
    names, text = seq_id.unique(return_inverse=True)
    found = []
    for name in names.tolist():
        length = int(pos[seq_id == name].max()) + 1
        mine = (rows.seq_id == name) & (rows.pos < length)
        where = rows.pos[mine]
        resid = torch.zeros(length, rows.resid.shape[1])
        resid[where] = rows.resid[mine].float()

        missing = torch.ones(length, dtype=torch.bool)
        missing[where] = False
        if bool(missing.any()):
            end = int(missing.nonzero().max()) + 1
            beginning = torch.from_numpy(tokens[name, :end])[None].to(lm.device)
            again = lm.trunk(beginning, layer).resid[0].float().cpu()
            resid[:end][missing[:end]] = again[missing[:end]]
        found.append(resid.to(lm.device))
    return Texts(tuple(found), text.to(lm.device), pos.to(lm.device))
