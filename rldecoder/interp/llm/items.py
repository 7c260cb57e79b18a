"""Windows that a judge is asked about: which, with what marks, and what is true of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.interp.llm.prompts import Marked, marked_text
from rldecoder.interp.scores import STRONG_FRACTION, ScoringText

Cells = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class Item(NamedTuple):
    """One window of the scored split."""

    cells: Cells
    """Its valid cells, increasing."""
    marked: Cells
    """Cells whose tokens are marked; none for detection."""
    truth: bool
    """Detection: the latent fires in it. Fuzzing: the marks are where it fires."""


class ItemSampler:
    """Draws windows of one split for one latent after the other."""

    def __init__(self, text: ScoringText) -> None:
        self.text = text
        cells = np.flatnonzero(text.valid)
        # Cells are numbered in reading order, so those of a window are neighbours.
        self._cells = cells
        windows = text.window_of[cells]
        self._start = np.searchsorted(windows, np.arange(text.num_windows), "left")
        self._end = np.searchsorted(windows, np.arange(text.num_windows), "right")
        self._used = np.flatnonzero(text.used)

    def active_share(self, fires: Cells) -> float:
        """Share of the split's windows in which the latent fires."""
        return np.unique(self.text.window_of[fires]).size / max(self._used.size, 1)

    def detection(
        self, fires: Cells, acts: NDArray[np.float32], count: int, rng: np.random.Generator
    ) -> list[Item]:
        """`count` windows of each kind, see `both_kinds`; empty unless there are so many."""
        nothing = np.zeros(0, np.int64)
        drawn = self.both_kinds(fires, acts, count, rng)
        items = [Item(self.cells(window), nothing, truth) for window, truth in drawn]
        return [items[i] for i in rng.permutation(len(items))]

    def both_kinds(
        self, fires: Cells, acts: NDArray[np.float32], count: int, rng: np.random.Generator
    ) -> list[tuple[int, bool]]:
        """Windows, and whether the latent fires there: `count` active ones, spread over the range
        of their strongest activation, and as many silent ones.

        Empty unless there are so many of each.
        """
        order = np.argsort(-acts, kind="stable")
        windows, first = np.unique(self.text.window_of[fires[order]], return_index=True)
        active = windows[np.argsort(first)]  # strongest first
        silent = np.setdiff1d(self._used, windows)
        if min(active.size, silent.size) < count:
            return []
        parts = np.array_split(active, count)
        chosen = [(int(part[rng.integers(part.size)]), True) for part in parts]
        drawn = rng.choice(silent, count, replace=False)
        return chosen + [(int(window), False) for window in drawn]

    def strong_and_silent(self, fires: Cells, acts: NDArray[np.float32]) -> tuple[Cells, Cells]:
        """Windows with a strong activation, and those without any."""
        strong = fires[acts >= STRONG_FRACTION * acts.max(initial=0)]
        windows = self.text.window_of
        return np.unique(windows[strong]), np.setdiff1d(self._used, windows[fires])

    def fuzzing(
        self, fires: Cells, acts: NDArray[np.float32], count: int, rng: np.random.Generator
    ) -> list[Item]:
        """`count` windows with their strong tokens marked, and as many with others marked instead.

        Only windows that hold enough others are drawn. Empty unless there are so many of them.
        """
        if not fires.size:
            return []
        strong = fires[acts >= STRONG_FRACTION * acts.max()]
        usable: list[tuple[Cells, Cells, Cells]] = []
        windows = np.unique(self.text.window_of[strong])
        for window in rng.permutation(windows):
            cells = self.cells(int(window))
            inside = strong[self.text.window_of[strong] == window]
            others = np.setdiff1d(cells, inside)
            if others.size >= inside.size:
                usable.append((cells, inside, others))
            if len(usable) == 2 * count:
                break
        if len(usable) < 2 * count:
            return []
        items = [Item(cells, inside, True) for cells, inside, _ in usable[:count]]
        for cells, inside, others in usable[count:]:
            decoys = np.sort(rng.choice(others, inside.size, replace=False))
            items.append(Item(cells, decoys, False))
        return [items[i] for i in rng.permutation(len(items))]

    def show(self, item: Item) -> str:
        """The window's text, with its marks."""
        marks = frozenset(np.flatnonzero(np.isin(item.cells, item.marked)).tolist())
        return marked_text(Marked(self.tokens(item.cells), marks))

    def tokens(self, cells: Cells) -> list[str]:
        """Texts of the tokens of some cells."""
        found = self.text.grid.tokens.reshape(-1)[cells].tolist()
        return [self.text.vocabulary.texts[t] if t >= 0 else "" for t in found]

    def cells(self, window: int) -> Cells:
        """Valid cells of a window, increasing."""
        return self._cells[self._start[window] : self._end[window]]


def read_exactly(item: Item, held: BoolArray) -> bool:
    """What a reader who applies a predicate without error answers; `held` [cells]: it holds."""
    if item.marked.size:
        return bool(2 * np.count_nonzero(held[item.marked]) >= item.marked.size)
    return bool(held[item.cells].any())


def balanced(items: list[Item], answers: list[bool | None]) -> float | None:
    """Balanced accuracy; an answer that is missing is wrong. None without items of both kinds."""
    shares = []
    for kind in (True, False):
        right = [a is kind for item, a in zip(items, answers, strict=True) if item.truth is kind]
        if not right:
            return None
        shares.append(float(np.mean(right)))
    return 0.5 * (shares[0] + shares[1])
