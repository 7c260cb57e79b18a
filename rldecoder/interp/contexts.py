"""Where any latent fires in held-out text, with what stands around it.

Labels show examples of the `label` split, which they were made from, and of the most important
latents only. Here every latent of the dictionary can be asked for, on text that no label has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rldecoder.errors import BadInputError
from rldecoder.interp.corpus import SplitFirings
from rldecoder.interp.predicate import UNKNOWN

BEFORE, AFTER = 14, 6
"""Tokens shown around a firing."""


class FiringContext(NamedTuple):
    """A window of text around a strong activation."""

    seq_id: int
    """Sequence of the split."""
    pos: int
    """Position of the activation in the sequence."""
    act: float
    """In the SAE's units."""
    tokens: list[str]
    """Texts of the window's tokens, raw: escape them before showing."""
    acts: list[float]
    """The latent's activation at each."""
    focus: int
    """Index in `tokens` of the token at `pos`."""


class LatentContexts(NamedTuple):
    """A latent on a split."""

    latent: int
    split: str
    firings: int
    """Tokens on which it fires."""
    tokens: int
    """Tokens that were read."""
    contexts: list[FiringContext]
    """The strongest, at most one a window."""


class HeldOutText:
    """A split as the SAE reads it.

    Args:
        found: firings of the whole dictionary (`read_firings`).
        text_of: a token's text, raw.
    """

    def __init__(self, found: SplitFirings, text_of: Callable[[int], str]) -> None:
        self.grid, self._firings, self._text_of = found.grid, found.firings, text_of

    def contexts(self, latent: int, count: int = 6) -> LatentContexts:
        """Where a latent fires most strongly.

        Raises:
            BadInputError: the dictionary has no such latent.
        """
        size = len(self._firings.latents)
        if not 0 <= latent < size:
            raise BadInputError(
                f"There is no latent {latent}.",
                f"The dictionary has latents 0 to {size - 1}.",
                "Choose one of those.",
            )

        cells, acts = self._firings.row(latent)
        dense = dict(zip(cells.tolist(), acts.tolist(), strict=True))
        shown: list[FiringContext] = []
        taken: set[int] = set()
        # Strongest first; of equal ones the first in the text. One window shows its strongest only.
        for index in np.lexsort((cells, -acts)).tolist():
            if len(shown) == count:
                break
            cell = int(cells[index])
            if cell in taken:
                continue
            shown.append(self._context(cell, dense))
            row = cell // self.grid.num_positions
            near = range(cell - BEFORE - AFTER, cell + BEFORE + AFTER + 1)
            taken.update(one for one in near if one // self.grid.num_positions == row)
        read = int(self.grid.valid.sum())
        return LatentContexts(latent, self.grid.split, len(cells), read, shown)

    def _context(self, cell: int, dense: dict[int, float]) -> FiringContext:
        row, position = divmod(cell, self.grid.num_positions)
        start = row * self.grid.num_positions
        known = self.grid.tokens[row]
        window = range(
            max(position - BEFORE, 0), min(position + AFTER + 1, self.grid.num_positions)
        )
        # A position that was not cached, such as the attention sink, has no known token.
        places = [place for place in window if known[place] != UNKNOWN]
        return FiringContext(
            int(self.grid.seq_ids[row]),
            position,
            dense[cell],
            [self._text_of(int(known[place])) for place in places],
            [dense.get(start + place, 0.0) for place in places],
            places.index(position),
        )
