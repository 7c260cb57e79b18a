"""Latents drawn uniformly from one SAE, for controls: the same procedure on each kind of SAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch
from rldecoder.data.shards import read_token_table
from rldecoder.interp.corpus import SplitFirings, read_firings, with_documents
from rldecoder.interp.labelling import draw_alive
from rldecoder.sae.model import Sae, SparseLatents


class SplitSource(NamedTuple):
    """Where the splits are read from."""

    activations: Path
    """Folder of the cached activations."""
    tokens: Path
    """Folder of the token tables."""
    batch_tokens: int
    """Tokens encoded at once; changes memory only."""

    def reader(self, split: str) -> ActivationReader:
        """The split's activations."""
        return ActivationReader(self.activations, split)

    def firings(
        self,
        sae: Sae,
        split: str,
        latents: NDArray[np.int64] | None,
        max_tokens: int,
        observe: Callable[[ActivationBatch, SparseLatents], None] | None = None,
        sequences: NDArray[np.int64] | None = None,
        encoded: Iterator[SparseLatents] | None = None,
    ) -> SplitFirings:
        """Firings on cached activations, with documents from the token table; see `read_firings`.

        Raises:
            BadInputError: the split has no activations.
        """
        grid, firings = read_firings(
            self.reader(split), sae, split=split, latents=latents, max_tokens=max_tokens,
            batch_tokens=self.batch_tokens, observe=observe, sequences=sequences, encoded=encoded,
        )  # fmt: skip
        return SplitFirings(with_documents(grid, read_token_table(self.tokens, split)), firings)


class ControlLatents(NamedTuple):
    """Some latents of one SAE on both splits, in the same rows."""

    fit: SplitFirings
    """Where they are labelled."""
    scored: SplitFirings
    """Where their labels are scored; other documents."""

    def sample(self, count: int, seed: int) -> ControlLatents:
        """At most `count` of them, drawn uniformly."""
        size = self.fit.firings.latents.size
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(size, min(count, size), replace=False))
        return ControlLatents(
            *(split._replace(firings=split.firings.select(rows)) for split in self)
        )


def draw_latents(
    source: SplitSource,
    sae: Sae,
    *,
    count: int,
    max_tokens: int,
    min_firings: int,
    rng: np.random.Generator,
) -> ControlLatents:
    """Latents drawn uniformly from those that fire `min_firings` times on the `label` split.

    Args:
        count: how many, at most.
        max_tokens: read of each split.
    """
    fit = source.firings(sae, "label", None, max_tokens)
    chosen = draw_alive(fit.firings, count, min_firings, rng)
    fit = fit._replace(firings=fit.firings.select(chosen))
    return ControlLatents(fit, source.firings(sae, "test", fit.firings.latents, max_tokens))
