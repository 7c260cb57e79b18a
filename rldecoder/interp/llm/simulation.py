"""Simulation for labels in words: the judge guesses every token's activation from the label alone.

After Bills et al. 2023; compared with the real activations as a predicate's are (`correlate`), but
over the windows asked about, in half of which the latent fires.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.interp.llm.items import Cells, ItemSampler
from rldecoder.interp.simulation import correlate


class Window(NamedTuple):
    """One window of the scored split, with what is to be guessed."""

    cells: Cells
    """Its valid cells, increasing."""
    acts: NDArray[np.float64]
    """[cells] the latent's activations, 0 where it is silent."""


def draw_windows(
    sampler: ItemSampler,
    fires: Cells,
    acts: NDArray[np.float32],
    count: int,
    rng: np.random.Generator,
) -> list[Window]:
    """`count` active windows and as many silent ones; empty unless there are so many."""
    if not count:
        return []
    windows = []
    for number, _ in sampler.both_kinds(fires, acts, count, rng):
        cells = sampler.cells(number)
        real = np.zeros(cells.size)
        inside = np.isin(fires, cells)
        real[np.searchsorted(cells, fires[inside])] = acts[inside]
        windows.append(Window(cells, real))
    return windows


def judged_simulation(
    windows: Sequence[Window], answers: Sequence[list[int] | None]
) -> float | None:
    """Correlation over all tokens of the windows with an answer, times the share of those windows.

    So a window without a usable answer counts as one whose correlation is 0: as much as a guess
    that is the same everywhere.

    Args:
        answers: a guess a token, from 0 to 10, or None.

    None without windows.
    """
    if not windows:
        return None
    known = [(w.acts, a) for w, a in zip(windows, answers, strict=True) if a is not None]
    if not known:
        return 0.0
    real = np.concatenate([acts for acts, _ in known])
    guesses = np.concatenate([np.asarray(guess, np.float64) for _, guess in known])
    # Without an answer on any active window there is nothing that could be told apart.
    return (correlate(guesses, real) or 0.0) * len(known) / len(windows)
