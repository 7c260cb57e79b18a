"""How good a label is, measured by running its predicate on text the labeler has not seen.

population: the predicate against the firings on every valid cell of the split: precision, recall,
    F1, average precision (AUPRC). These show what balanced sets hide at low base rates.
detection (2410.13928): a window counts as predicted if the predicate holds anywhere in it, and as
    active if the latent fires anywhere in it; balanced accuracy over *all* windows of the split.
fuzzing (2410.13928): in a window with strong activations (>= 0.3 of the latent's largest in the
    split) either those tokens are marked, or as many others that stay below; the predicate judges
    a marking right if it holds on at least half of the marked tokens. Balanced accuracy.
A failed label is scored 0 everywhere: every one of its answers counts as wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rldecoder.interp.corpus import Firings, TokenGrid
from rldecoder.interp.predicate import Predicate, evaluate
from rldecoder.interp.vocabulary import Vocabulary

BoolArray = NDArray[np.bool_]
STRONG_FRACTION = 0.3

SCORES = pa.schema(
    [
        ("latent", pa.int32()),
        ("method", pa.string()),
        ("labelled", pa.bool_()),
        ("firings", pa.int64()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("f1", pa.float64()),
        ("auprc", pa.float64()),
        ("base_rate", pa.float64()),
        ("detection", pa.float64()),
        ("detection_positive", pa.int64()),
        ("detection_negative", pa.int64()),
        ("fuzzing", pa.float64()),
        ("fuzzing_windows", pa.int64()),
    ]
)
"""One row a latent and method ("label", "shuffled", "random_sae"). Scores are 0 to 1, and null
where they are not defined (no window of one of the two kinds; `firings` tells why)."""


class LabelScores(NamedTuple):
    """Scores of one label on one split; None where a score is not defined."""

    firings: int
    """Cells where the latent fires."""
    precision: float | None
    recall: float | None
    f1: float | None
    auprc: float | None
    """Average precision of the yes/no answer: precision * recall + base rate * (1 - recall)."""
    base_rate: float
    """Share of cells where the latent fires."""
    detection: float | None
    """Balanced accuracy over windows."""
    detection_positive: int
    detection_negative: int
    fuzzing: float | None
    fuzzing_windows: int


class ScoringText:
    """One split, cut into windows, prepared for scoring many labels.

    Args:
        grid: the split; only its valid cells count.
        window_tokens: width of a window; a sequence's last one may be shorter.
    """

    def __init__(self, grid: TokenGrid, vocabulary: Vocabulary, window_tokens: int) -> None:
        self.grid, self.vocabulary = grid, vocabulary
        self.valid = grid.valid.reshape(-1)
        row, position = np.divmod(np.arange(grid.num_cells), grid.num_positions)
        per_row = -(-grid.num_positions // window_tokens)
        self.window_of = row * per_row + position // window_tokens
        self.num_windows = int(grid.tokens.shape[0] * per_row)
        self.used = np.bincount(self.window_of[self.valid], minlength=self.num_windows) > 0

    def holds(self, predicate: Predicate) -> BoolArray:
        """[cells] where the predicate holds; False on cells that are not valid."""
        return evaluate(predicate, self.grid.tokens, self.vocabulary).reshape(-1) & self.valid

    def score(
        self,
        held: BoolArray | None,
        fires: NDArray[np.int64],
        acts: NDArray[np.float32],
        rng: np.random.Generator,
    ) -> LabelScores:
        """Score one label against one latent.

        Args:
            held: [cells] from `holds`; None for a failed label.
            fires: cells where the latent fires (valid ones only).
            acts: its activations there.
            rng: draws the unmarked tokens of fuzzing.
        """
        cells = int(self.valid.sum())
        base_rate = fires.size / max(cells, 1)
        active = self._windows(fires)
        positive = int(active.sum())
        negative = int(self.used.sum()) - positive
        if held is None:
            return LabelScores(
                int(fires.size), 0.0, 0.0, 0.0, 0.0, base_rate, 0.0, positive, negative, 0.0, 0
            )
        hits, total = int(held[fires].sum()), int(held.sum())
        precision = hits / total if total else (None if fires.size == 0 else 0.0)
        recall = hits / fires.size if fires.size else None
        f1 = 2 * hits / (total + fires.size) if total + fires.size else None
        auprc = None
        if recall is not None and precision is not None:
            auprc = precision * recall + base_rate * (1 - recall)
        detection = None
        if positive and negative:
            named = self._windows(np.flatnonzero(held))
            found = int((named & active).sum()) / positive
            false = int((named & ~active).sum()) / negative
            detection = 0.5 * (found + 1 - false)
        fuzzing, windows = self._fuzz(held, fires, acts, rng)
        return LabelScores(
            int(fires.size),
            precision,
            recall,
            f1,
            auprc,
            base_rate,
            detection,
            positive,
            negative,
            fuzzing,
            windows,
        )

    def _windows(self, cells: NDArray[np.int64]) -> BoolArray:
        out = np.zeros(self.num_windows, bool)
        out[self.window_of[cells]] = True
        return out

    def _fuzz(
        self,
        held: BoolArray,
        fires: NDArray[np.int64],
        acts: NDArray[np.float32],
        rng: np.random.Generator,
    ) -> tuple[float | None, int]:
        """Balanced accuracy over the windows where as many weak tokens as strong ones exist."""
        if fires.size == 0:
            return None, 0
        strong = fires[acts >= STRONG_FRACTION * acts.max()]
        marked = np.bincount(self.window_of[strong], minlength=self.num_windows)
        weak = self.valid & (marked[self.window_of] > 0)
        weak[strong] = False
        weak_cells = np.flatnonzero(weak)
        available = np.bincount(self.window_of[weak_cells], minlength=self.num_windows)
        usable = (marked > 0) & (available >= marked)
        if not usable.any():
            return None, 0
        # A random order within each window; the first `marked` of it are the decoys.
        order = np.lexsort((rng.random(weak_cells.size), self.window_of[weak_cells]))
        shuffled = weak_cells[order]
        window = self.window_of[shuffled]
        first = np.concatenate([[0], available.cumsum()[:-1]])
        decoys = shuffled[np.arange(shuffled.size) - first[window] < marked[window]]
        right = self._majority(held, strong, marked)
        wrong = self._majority(held, decoys, marked)
        score = 0.5 * (right[usable].mean() + 1 - wrong[usable].mean())
        return float(score), int(usable.sum())

    def _majority(
        self, held: BoolArray, cells: NDArray[np.int64], marked: NDArray[np.int64]
    ) -> BoolArray:
        """[windows] whether the predicate holds on at least half of a window's marked cells."""
        count = np.bincount(self.window_of[cells[held[cells]]], minlength=self.num_windows)
        return (2 * count >= marked) & (marked > 0)


def score_all(
    text: ScoringText,
    predicates: list[Predicate | None],
    firings: Firings,
    rng: np.random.Generator,
) -> list[LabelScores]:
    """Score the label of each row of `firings` against that row's latent."""
    inside = firings.within(text.valid)
    out = []
    for row, predicate in enumerate(predicates):
        held = None if predicate is None else text.holds(predicate)
        fires, acts = inside.row(row)
        out.append(text.score(held, fires.astype(np.int64), acts, rng))
    return out


def derangement(size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random permutation without fixed points, by Sattolo's cyclic shuffle (size >= 2)."""
    order = np.arange(size)
    for last in range(size - 1, 0, -1):
        other = int(rng.integers(0, last))
        order[last], order[other] = order[other], order[last]
    return order


def mean_or_none(values: list[float | None]) -> float | None:
    """The mean of the defined values; None if there is none."""
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None
