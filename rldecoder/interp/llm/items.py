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
    """Draws windows of one split for one latent after the other.

    Args:
        count: windows of each of the two kinds, for detection and for fuzzing.
    """

    def __init__(self, text: ScoringText, count: int) -> None:
        self.text, self.count = text, count
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
        self, fires: Cells, acts: NDArray[np.float32], rng: np.random.Generator
    ) -> list[Item]:
        """Active windows, spread over the range of their strongest activation, and silent ones.

        Empty unless there are `count` of each.
        """
        order = np.argsort(-acts, kind="stable")
        windows, first = np.unique(self.text.window_of[fires[order]], return_index=True)
        active = windows[np.argsort(first)]  # strongest first
        silent = np.setdiff1d(self._used, windows)
        if min(active.size, silent.size) < self.count:
            return []
        nothing = np.zeros(0, np.int64)
        chosen = [(int(part[rng.integers(part.size)]), True) for part in self._parts(active)]
        drawn = rng.choice(silent, self.count, replace=False)
        chosen += [(int(window), False) for window in drawn]
        items = [Item(self._of(window), nothing, truth) for window, truth in chosen]
        return [items[i] for i in rng.permutation(len(items))]

    def fuzzing(
        self, fires: Cells, acts: NDArray[np.float32], rng: np.random.Generator
    ) -> list[Item]:
        """Windows with their strong tokens marked, and other windows with as many others marked.

        Only windows that hold enough others count. Empty unless there are 2 `count` of them.
        """
        if not fires.size:
            return []
        strong = fires[acts >= STRONG_FRACTION * acts.max()]
        usable: list[tuple[Cells, Cells, Cells]] = []
        windows = np.unique(self.text.window_of[strong])
        for window in rng.permutation(windows):
            cells = self._of(int(window))
            inside = strong[self.text.window_of[strong] == window]
            others = np.setdiff1d(cells, inside)
            if others.size >= inside.size:
                usable.append((cells, inside, others))
            if len(usable) == 2 * self.count:
                break
        if len(usable) < 2 * self.count:
            return []
        items = [Item(cells, inside, True) for cells, inside, _ in usable[: self.count]]
        for cells, inside, others in usable[self.count :]:
            decoys = np.sort(rng.choice(others, inside.size, replace=False))
            items.append(Item(cells, decoys, False))
        return [items[i] for i in rng.permutation(len(items))]

    def show(self, item: Item) -> str:
        """The window's text, with its marks."""
        tokens = self.text.grid.tokens.reshape(-1)[item.cells]
        texts = self.text.vocabulary.texts
        marks = frozenset(np.flatnonzero(np.isin(item.cells, item.marked)).tolist())
        return marked_text(Marked([texts[t] if t >= 0 else "" for t in tokens.tolist()], marks))

    def _of(self, window: int) -> Cells:
        return self._cells[self._start[window] : self._end[window]]

    def _parts(self, active: Cells) -> list[Cells]:
        return np.array_split(active, self.count)


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
