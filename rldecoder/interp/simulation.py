"""Simulation: activations predicted from a label alone, compared with the real ones.

After Bills et al. 2023 (openaipublic.blob.core.windows.net/neuron-explainer/paper), where a
language model reads the label and guesses each token's activation: `correlate`. An executable label
needs no such reader: what it says of a token is whether the predicate holds there, and the best
guess from that is the mean activation of such tokens, measured on the text the label was fitted on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Levels(NamedTuple):
    """Expected activation of a token, in the SAE's units, given what the label says of it."""

    silent: float
    """Where the predicate does not hold."""
    held: float
    """Where it holds."""


UNIT = Levels(0.0, 1.0)
"""Without text to measure levels on: only the order of the two, which correlation reads."""


class Simulation(NamedTuple):
    """How well simulated activations follow the real ones; None where it is not defined."""

    correlation: float | None
    """Pearson correlation over all cells, -1 to 1: `ev_correlation` of Bills et al. 2023."""
    explained: float | None
    """1 - (mean squared error) / (variance of the real ones); below 0 if worse than their mean."""


def fit_levels(
    held: NDArray[np.bool_], fires: NDArray[np.int64], acts: NDArray[np.float32], num_cells: int
) -> Levels:
    """Mean activation where the predicate holds, and elsewhere; 0 for a side without cells.

    Args:
        held: [cells] where the predicate holds, valid cells only.
        fires: cells where the latent fires (valid ones only).
        acts: its activations there; it is 0 on all other cells.
    """
    values = acts.astype(np.float64)
    inside, count = float(values[held[fires]].sum()), int(held.sum())
    outside = float(values.sum()) - inside
    return Levels(outside / max(num_cells - count, 1), inside / max(count, 1))


def simulate(
    levels: Levels,
    held: NDArray[np.bool_],
    fires: NDArray[np.int64],
    acts: NDArray[np.float32],
    num_cells: int,
) -> Simulation:
    """Compare the activations that the levels predict with the real ones; arguments as above.

    A prediction that is the same everywhere has correlation 0: it tells no token from another.
    """
    n, values = float(num_cells), acts.astype(np.float64)
    total, square = float(values.sum()), float((values**2).sum())
    inside, count = float(values[held[fires]].sum()), float(held.sum())
    variance = square / n - (total / n) ** 2 if n else 0.0
    if variance <= 0:
        return Simulation(None, None)
    step = levels.held - levels.silent
    spread = count / n * (1 - count / n)
    covariance = inside / n - total / n * count / n
    correlation = float(np.sign(step)) * _pearson(covariance, spread, variance)
    cross = levels.silent * total + step * inside
    power = levels.silent**2 * (n - count) + levels.held**2 * count
    return Simulation(correlation, 1 - (square - 2 * cross + power) / n / variance)


def correlate(simulated: NDArray[np.float64], real: NDArray[np.float64]) -> float | None:
    """Correlation of guessed with real activations, by the conventions of `simulate`.

    Args:
        simulated: [cells] guesses, in any unit.
        real: [cells] activations, 0 where the latent is silent.

    None if the real ones are the same everywhere.
    """
    if not np.ptp(real):
        return None
    if not np.ptp(simulated):
        return 0.0
    guess, truth = simulated - simulated.mean(), real - real.mean()
    covariance = float((guess * truth).mean())
    return _pearson(covariance, float((guess**2).mean()), float((truth**2).mean()))


def _pearson(covariance: float, simulated: float, real: float) -> float:
    """From covariance and variances; 0 for a guess that is the same everywhere."""
    return float(covariance / np.sqrt(simulated * real)) if simulated > 0 else 0.0
