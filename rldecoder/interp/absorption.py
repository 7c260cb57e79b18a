"""Absorption: where a latent's label holds and it is silent, because a more special one stands in.

A sparse code saves a latent by letting "short" say "starts with s" along with its own meaning
(Chanin et al. 2024, arXiv 2409.14507). They find the general meaning with a probe; here it is the
latent's own label, which can be run, and its own row of the SAE's decoder.

For a latent g with a predicate: *hits* are the cells where it holds and g fires, *misses* those
where it holds and g is silent. On a miss, latent s *stands in* for g if of all latents that fire
there it writes most along g's direction, and that at least `strength` of what g writes on a hit
(median). g -> s is a link if s stands in on enough misses, fires less often on hits than on misses,
and fires mostly where the predicate holds: it is a special case, not a companion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse

from rldecoder.config.interp import ClusterFeaturesConfig
from rldecoder.schemas import table_schema

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

INSIDE = 0.5
"""Share of s's firings where g's predicate holds, at least."""


class Link(NamedTuple):
    """Latent `special` absorbs some of what latent `general` means."""

    general: int
    special: int
    misses: int
    """Cells where the predicate of `general` holds and it is silent."""
    absorbed: int
    """Those where `special` stands in."""
    share: float
    """absorbed / misses."""
    cosine: float
    """Of the two rows of the SAE's decoder."""
    strength: float
    """Mean over the absorbed cells of what `special` writes along the direction of `general`, in
    units of what `general` writes on its hits (median)."""
    inside: float
    """Share of the firings of `special` where the predicate holds."""
    together: float
    """Share of the hits on which `special` fires too."""


LINKS = table_schema(Link).append(pa.field("fingerprint_cosine", pa.float64()))
"""One row a link, as in `Link`. `fingerprint_cosine`: whether ablating either moves the decoder's
logits alike; null if one of the two has no effect on the probe tokens."""


def absorption_links(
    labelled: Sequence[tuple[int, BoolArray]],
    acts: sparse.csr_array,
    directions: FloatArray,
    config: ClusterFeaturesConfig,
) -> list[Link]:
    """Links of the labelled latents to any latent, most absorbed cells first.

    Args:
        labelled: latents with a predicate, and where it holds [cells] (only on cells read).
        acts: [L, cells] activations of all latents; row = latent.
        directions: [L, D] rows of the SAE's decoder.
        config: its `absorption_` limits.
    """
    norms = np.maximum(np.linalg.norm(directions, axis=1), 1e-12)
    by_cell = sparse.csc_array(acts)
    counts = np.diff(acts.indptr)
    links = []
    for general, holds in labelled:
        fires = np.zeros(holds.size, bool)
        start, end = acts.indptr[general], acts.indptr[general + 1]
        fires[acts.indices[start:end]] = True
        hits, misses = np.flatnonzero(holds & fires), np.flatnonzero(holds & ~fires)
        if hits.size == 0 or misses.size < config.absorption_cells:
            continue

        # What each latent writes along the general one's direction, on a miss of it.
        along = directions @ (directions[general] / norms[general])
        usual = float(np.median(acts.data[start:end][holds[acts.indices[start:end]]]))
        best, written = _largest(by_cell, misses, along / (usual * norms[general]))
        cosine = along / norms
        stands_in = (best >= 0) & (written >= config.absorption_strength)
        stands_in &= cosine[best] >= config.absorption_cosine

        for special, absorbed in zip(*np.unique(best[stands_in], return_counts=True), strict=True):
            cells = acts.indices[acts.indptr[special] : acts.indptr[special + 1]]
            on_misses = int(np.count_nonzero(holds[cells] & ~fires[cells]))
            on_hits = int(np.count_nonzero(holds[cells] & fires[cells]))
            link = Link(
                general=int(general),
                special=int(special),
                misses=misses.size,
                absorbed=int(absorbed),
                share=float(absorbed / misses.size),
                cosine=float(cosine[special]),
                strength=float(written[stands_in & (best == special)].mean()),
                inside=(on_misses + on_hits) / int(counts[special]),
                together=on_hits / hits.size,
            )
            if (
                link.absorbed >= config.absorption_cells
                and link.share >= config.absorption_share
                and link.inside >= INSIDE
                and link.together < on_misses / misses.size
            ):
                links.append(link)
    return sorted(links, key=lambda link: (-link.absorbed, link.general, link.special))


def _largest(
    by_cell: sparse.csc_array, cells: NDArray[np.int64], scale: FloatArray
) -> tuple[NDArray[np.int64], FloatArray]:
    """For each cell the latent with the largest activation times `scale` [L], and that value;
    latent -1 and value 0 where nothing fires."""
    part = by_cell[:, cells]
    values = part.data.astype(np.float64) * scale[part.indices]
    best, written = np.full(cells.size, -1, np.int64), np.zeros(cells.size)
    column = np.repeat(np.arange(cells.size), np.diff(part.indptr))
    # Ascending within a column, so the last one written is the largest.
    order = np.lexsort((values, column))
    best[column[order]], written[column[order]] = part.indices[order], values[order]
    return best, written
