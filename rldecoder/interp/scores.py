"""How good a label is, measured by running its predicate on text the labeler has not seen.

population: the predicate against the firings on every valid cell of the split: precision, recall,
    F1, average precision (AUPRC). These show what balanced sets hide at low base rates.
detection (2410.13928): a window counts as predicted if the predicate holds anywhere in it, and as
    active if the latent fires anywhere in it; balanced accuracy over *all* windows of the split.
    The hard form takes as negatives only near misses (`near_miss`), as many as there are active
    windows.
fuzzing (2410.13928): in a window with strong activations (>= 0.3 of the latent's largest in the
    split) either those tokens are marked, or as many others that stay below; the predicate judges
    a marking right if it holds on at least half of the marked tokens. Balanced accuracy. The hard
    form marks the others that are near misses first.
intruder (2507.08473): of five windows, four with a strong activation and one without any, the
    predicate points at the one where it does not hold. See `intruder_score`.
simulation (Bills et al. 2023): see `simulation`.
A failed label is scored 0 everywhere: every one of its answers counts as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rldecoder.interp.corpus import Firings, TokenGrid
from rldecoder.interp.near_miss import NearMisses, hardest
from rldecoder.interp.predicate import Predicate, evaluate
from rldecoder.interp.records import Scores
from rldecoder.interp.simulation import UNIT, Levels, fit_levels, simulate
from rldecoder.interp.vocabulary import Vocabulary

BoolArray = NDArray[np.bool_]
STRONG_FRACTION = 0.3
INTRUDER_WINDOWS = 5


class LabelScores(Scores):
    """Scores of one label on one split, with the counts behind them."""

    base_rate: float
    """Share of cells where the latent fires."""
    detection_positive: int
    """Active windows."""
    detection_negative: int
    """Quiet ones."""
    fuzzing_windows: int
    """Windows with as many weak tokens as strong ones."""
    near_misses: int = 0
    """Negatives of `detection_hard`."""
    simulation_explained: float | None = None
    """Share of the activations' variance that the simulated ones explain."""

    @property
    def published(self) -> Scores:
        """What the label's record shows."""
        return Scores(**{name: getattr(self, name) for name in Scores.model_fields})


SUMMARISED = tuple(
    name for name, field in Scores.model_fields.items() if field.annotation == float | None
)
"""The scores of which means are told."""

COLUMNS = (
    "firings", "precision", "recall", "f1", "auprc", "base_rate", "detection",
    "detection_positive", "detection_negative", "fuzzing", "fuzzing_windows", "detection_hard",
    "near_misses", "fuzzing_hard", "intruder", "simulation", "simulation_explained",
)  # fmt: skip
"""All fields of LabelScores, in the order of the table."""
SCORES = pa.schema(
    [
        ("latent", pa.int32()),
        ("method", pa.string()),
        ("labelled", pa.bool_()),
        *(
            (name, pa.int64() if LabelScores.model_fields[name].annotation is int else pa.float64())
            for name in COLUMNS
        ),
    ]
)
"""One row a latent and method ("label", "shuffled", "random_sae", "drawn"). Scores are 0 to 1
(`intruder` and `simulation` can be negative: worse than chance), and null where they are not
defined (no window of one of the two kinds; `firings` tells why)."""


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
        # Windows lie in the order of their cells, each in one piece.
        self.starts = np.searchsorted(self.window_of, np.arange(self.num_windows))
        self.near = NearMisses(grid)

    def holds(self, predicate: Predicate) -> BoolArray:
        """[cells] where the predicate holds; False on cells that are not valid."""
        return evaluate(predicate, self.grid.tokens, self.vocabulary).reshape(-1) & self.valid

    def score(
        self,
        held: BoolArray | None,
        fires: NDArray[np.int64],
        acts: NDArray[np.float32],
        rng: np.random.Generator,
        levels: Levels | None = None,
    ) -> LabelScores:
        """Score one label against one latent.

        Args:
            held: [cells] from `holds`; None for a failed label.
            fires: cells where the latent fires (valid ones only).
            rng: draws the unmarked tokens of fuzzing, and breaks ties among near misses.
            levels: activations expected by the label, from other text; without them
                `simulation_explained` is None.
        """
        cells = int(self.valid.sum())
        base_rate = fires.size / max(cells, 1)
        active = self._windows(fires)
        positive = int(active.sum())
        negative = int(self.used.sum()) - positive
        if held is None:
            return LabelScores(
                firings=fires.size, base_rate=base_rate, detection_positive=positive,
                detection_negative=negative, fuzzing_windows=0, simulation_explained=0.0,
                **dict.fromkeys(SUMMARISED, 0.0),
            )  # fmt: skip

        # Over all cells.
        hits, total = int(held[fires].sum()), int(held.sum())
        precision = hits / total if total else (None if fires.size == 0 else 0.0)
        recall = hits / fires.size if fires.size else None
        f1 = 2 * hits / (total + fires.size) if total + fires.size else None
        auprc = None
        if recall is not None and precision is not None:
            auprc = precision * recall + base_rate * (1 - recall)

        # Over windows. The random numbers are drawn in this order: another gives other decoys.
        named = self._windows(np.flatnonzero(held))
        quiet = self.used & ~active
        hardness = self.near.hardness(fires)
        by_window = np.maximum.reduceat(hardness, self.starts) * quiet
        near = hardest(by_window, positive, rng)
        strong = fires[acts >= STRONG_FRACTION * acts.max()] if fires.size else fires
        fuzzing, windows = self._fuzz(held, strong, None, rng)
        fuzzing_hard, _ = self._fuzz(held, strong, hardness, rng)
        simulated = simulate(levels or UNIT, held, fires, acts, cells)
        return LabelScores(
            firings=fires.size,
            precision=precision,
            recall=recall,
            f1=f1,
            auprc=auprc,
            base_rate=base_rate,
            detection=_balanced(named[active], named[quiet]),
            detection_positive=positive,
            detection_negative=negative,
            detection_hard=_balanced(named[active], named[near]),
            near_misses=near.size,
            fuzzing=fuzzing,
            fuzzing_windows=windows,
            fuzzing_hard=fuzzing_hard,
            intruder=intruder_score(named[self._windows(strong)], named[quiet]),
            simulation=simulated.correlation,
            simulation_explained=None if levels is None else simulated.explained,
        )

    def _windows(self, cells: NDArray[np.int64]) -> BoolArray:
        out = np.zeros(self.num_windows, bool)
        out[self.window_of[cells]] = True
        return out

    def _fuzz(
        self,
        held: BoolArray,
        strong: NDArray[np.int64],
        hardness: NDArray[np.float64] | None,
        rng: np.random.Generator,
    ) -> tuple[float | None, int]:
        """Balanced accuracy over the windows where as many weak tokens as strong ones exist.

        Decoys are drawn at random, or the hardest first.
        """
        if strong.size == 0:
            return None, 0
        marked = np.bincount(self.window_of[strong], minlength=self.num_windows)
        weak = self.valid & (marked[self.window_of] > 0)
        weak[strong] = False
        weak_cells = np.flatnonzero(weak)
        available = np.bincount(self.window_of[weak_cells], minlength=self.num_windows)
        usable = (marked > 0) & (available >= marked)
        if not usable.any():
            return None, 0
        # An order within each window; the first `marked` of it are the decoys.
        easy = np.zeros(weak_cells.size) if hardness is None else -hardness[weak_cells]
        order = np.lexsort((rng.random(weak_cells.size), easy, self.window_of[weak_cells]))
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


def _balanced(positives: BoolArray, negatives: BoolArray) -> float | None:
    """Balanced accuracy of yes on positives and no on negatives; None if one kind is missing."""
    if not positives.size or not negatives.size:
        return None
    return float(0.5 * (positives.mean() + 1 - negatives.mean()))


def intruder_score(
    active: BoolArray, quiet: BoolArray, windows: int = INTRUDER_WINDOWS
) -> float | None:
    """Chance-corrected accuracy at finding the one quiet window among `windows`.

    The predicate is shown `windows` - 1 windows drawn from `active` and one from `quiet`, and
    points at one in which it does not hold, or at any if it holds in all of them; the mean over
    all draws (with replacement) has a closed form. With a and b the shares of the two kinds in
    which it holds, and k windows, it is right with probability

        (1 - b) (1 - a^k) / (k (1 - a)) + b a^(k - 1) / k,

    which is 1 / k for a = b. Returned is (that - 1 / k) / (1 - 1 / k); None without windows of
    one kind. Source of the task: 2507.08473, where a language model points.

    Args:
        active: for windows with a strong activation, whether the predicate holds anywhere.
        quiet: the same for windows without any activation.
    """
    if not active.size or not quiet.size:
        return None
    a, b, k = float(active.mean()), float(quiet.mean()), windows
    # Sum of a^i for i < k: (1 - a^k) / (1 - a), and k at a = 1.
    right = (1 - b) * sum(a**i for i in range(k)) / k + b * a ** (k - 1) / k
    return (right - 1 / k) / (1 - 1 / k)


def score_all(
    text: ScoringText,
    predicates: list[Predicate | None],
    firings: Firings,
    rng: np.random.Generator,
    levels: list[Levels | None] | None = None,
) -> list[LabelScores]:
    """Score the label of each row of `firings` against that row's latent.

    Args:
        levels: from `fit_all_levels` on the text that the labels were fitted on.
    """
    inside = firings.within(text.valid)
    out = []
    for row, predicate in enumerate(predicates):
        held = None if predicate is None else text.holds(predicate)
        fires, acts = inside.row(row)
        level = None if levels is None else levels[row]
        out.append(text.score(held, fires.astype(np.int64), acts, rng, level))
    return out


def fit_all_levels(
    text: ScoringText, predicates: list[Predicate | None], firings: Firings
) -> list[Levels | None]:
    """The activations that each row's label stands for, on `text`; None for failed labels."""
    inside = firings.within(text.valid)
    out: list[Levels | None] = []
    for row, predicate in enumerate(predicates):
        fires, acts = inside.row(row)
        found = None
        if predicate is not None:
            held, cells = text.holds(predicate), int(text.valid.sum())
            found = fit_levels(held, fires.astype(np.int64), acts, cells)
        out.append(found)
    return out


def derangement(size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random permutation without fixed points, by Sattolo's cyclic shuffle (size >= 2)."""
    order = np.arange(size)
    for last in range(size - 1, 0, -1):
        other = int(rng.integers(0, last))
        order[last], order[other] = order[other], order[last]
    return order


def means(scores: Sequence[Any], names: Sequence[str]) -> dict[str, float | None]:
    """Means over latents of their defined scores, by score; None where no latent has it."""
    out: dict[str, float | None] = {}
    for name in names:
        kept = [value for found in scores if (value := getattr(found, name)) is not None]
        out[name] = float(np.mean(kept)) if kept else None
    return out
