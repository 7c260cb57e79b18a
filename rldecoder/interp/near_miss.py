"""Near misses: places that look as if the latent should fire there, and where it does not.

Negatives drawn at random are easy: any rough label tells them apart. A near miss holds a token on
which the latent fires elsewhere. Its *hardness* is the share of that token's occurrences, in the
same text, on which the latent fires.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rldecoder.interp.corpus import TokenGrid


class NearMisses:
    """Hardness of the cells of one split, for one latent after another."""

    def __init__(self, grid: TokenGrid) -> None:
        flat = grid.tokens.reshape(-1)
        valid = grid.valid.reshape(-1)
        kinds, self._kind = np.unique(flat, return_inverse=True)
        self._total = np.bincount(self._kind[valid], minlength=kinds.size)
        self._valid = valid

    def hardness(self, fires: NDArray[np.int64]) -> NDArray[np.float64]:
        """[cells] 0 to 1; 0 on cells that are not valid, and for tokens it never fires on.

        Args:
            fires: valid cells where the latent fires.
        """
        hits = np.bincount(self._kind[fires], minlength=self._total.size)
        rate = hits / np.maximum(self._total, 1)
        return np.asarray(rate[self._kind] * self._valid)


def hardest(
    hardness: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Indices [<= count] of the largest values above 0, largest first; ties in random order."""
    order = np.lexsort((rng.random(hardness.size), -hardness))[:count]
    return order[hardness[order] > 0].astype(np.int64)
