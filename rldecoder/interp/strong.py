"""Strong firings: an activation of at least a share of the latent's usual high.

With TopK most firings are weak and noisy: what a latent stands for shows where it fires strongly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rldecoder.interp.corpus import Firings

MIN_COUNT_FOR_P99 = 100
HIGH_QUANTILE = 0.99


def usual_highs(firings: Firings) -> NDArray[np.float64]:
    """[K] each latent's usual high: the 99th percentile of its activations.

    With fewer than 100 activations the maximum, since a p99 of few values is their maximum in all
    but name; infinity for latents that never fired.
    """
    out = np.full(len(firings.latents), np.inf)
    for row in range(len(out)):
        acts = np.sort(firings.row(row)[1])
        if acts.size:
            quantile = HIGH_QUANTILE if acts.size >= MIN_COUNT_FOR_P99 else 1.0
            out[row] = acts[int(np.ceil(quantile * acts.size)) - 1]
    return out


def at_least(firings: Firings, least: NDArray[np.float64]) -> Firings:
    """Only activations of at least `least` [K]."""
    return firings.of(firings.matrix.data >= np.repeat(least, firings.counts))
