"""Held-out text as arrays: the token grid of a split, and which latents fire where on it.

A *cell* is one position of one sequence; cells are numbered `row * T + position`. Everything
about a split (firings, predicates, windows) shares this numbering, so that counting is a product
of sparse matrices. Memory is bounded by the token budget: N cells, and at most N * k firings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch
from rldecoder.errors import BadInputError
from rldecoder.sae.model import Sae, SparseLatents

BoolArray = NDArray[np.bool_]
IntArray = NDArray[Any]
FloatArray = NDArray[np.float64]
UNKNOWN = -1
"""Stands for a token or document that is not known (before a sequence's start, or not cached)."""


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of some sequences of one split. S sequences, T positions."""

    split: str
    seq_ids: IntArray
    """[S] int64, increasing."""
    tokens: IntArray
    """[S, T] int64; UNKNOWN where a token is not known."""
    valid: BoolArray
    """[S, T]; True where the latents were read. Position 0 never is (attention sink)."""
    docs: IntArray
    """[S, T] int64 document ids; UNKNOWN where not known."""

    @property
    def num_positions(self) -> int:
        """T."""
        return int(self.tokens.shape[1])

    @property
    def num_cells(self) -> int:
        """S * T."""
        return int(self.tokens.size)

    @cached_property
    def cells(self) -> IntArray:
        """Numbers of the valid cells, increasing."""
        return np.flatnonzero(self.valid.reshape(-1))

    def shifted(self, offset: int) -> IntArray:
        """[S, T] the token `-offset` positions earlier in the sequence (offset <= 0)."""
        if offset == 0:
            return self.tokens
        out = np.full_like(self.tokens, UNKNOWN)
        out[:, -offset:] = self.tokens[:, :offset]
        return out

    def restricted(self, keep: BoolArray) -> TokenGrid:
        """The same grid with only the cells of `keep` [S, T] valid."""
        return replace(self, valid=self.valid & keep)


class Firings(NamedTuple):
    """Activations of some latents on a grid."""

    latents: IntArray
    """[K] int64: the latent that each row of `matrix` belongs to."""
    matrix: sparse.csr_array
    """[K, cells] float32 activations > 0, sorted by cell within a row."""

    def row(self, index: int) -> tuple[IntArray, NDArray[np.float32]]:
        """Cells where the latent of row `index` fires, increasing, and its activations there."""
        start, end = self.matrix.indptr[index], self.matrix.indptr[index + 1]
        return self.matrix.indices[start:end], self.matrix.data[start:end]

    @property
    def counts(self) -> IntArray:
        """[K] number of cells where each latent fires."""
        return np.diff(self.matrix.indptr)

    def within(self, valid: BoolArray) -> Firings:
        """Only the firings on cells where `valid` [cells] holds."""
        coo = self.matrix.tocoo()
        keep = valid[coo.col]
        kept = (coo.data[keep], (coo.row[keep], coo.col[keep]))
        return Firings(self.latents, _sorted_csr(kept, self.matrix.shape))

    def select(self, rows: IntArray) -> Firings:
        """The firings of some rows, in the order given."""
        return Firings(self.latents[rows], self.matrix[rows])


class SplitFirings(NamedTuple):
    """One pass over a split."""

    grid: TokenGrid
    firings: Firings


@torch.no_grad()
def read_firings(
    reader: ActivationReader,
    sae: Sae,
    *,
    split: str,
    latents: IntArray | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    observe: Callable[[ActivationBatch, SparseLatents], None] | None = None,
) -> SplitFirings:
    """Encode a split's cached residuals once and keep the firings of the latents of interest.

    Args:
        latents: [K] ids to keep; None keeps all of the dictionary.
        max_tokens: at most so many activation rows, from the split's start.
        batch_tokens: rows encoded at a time; changes memory, not results.
        observe: called with each batch and its latents, all of the dictionary.

    Raises:
        BadInputError: the split has no activations.
    """
    wanted = np.arange(sae.num_latents) if latents is None else np.asarray(latents, np.int64)
    row_of = np.full(sae.num_latents, UNKNOWN, np.int64)
    row_of[wanted] = np.arange(wanted.size)
    device = sae.W_enc.device
    seqs, positions, tokens, parts, start = [], [], [], [], 0
    for batch in reader.ordered(batch_tokens, columns=("resid",), max_tokens=max_tokens):
        assert batch.resid is not None
        found = sae.encode(batch.resid.to(device).float())
        if observe is not None:
            observe(batch, found)
        acts, rows = found.acts.cpu().numpy(), row_of[found.indices.cpu().numpy()]
        keep = (acts > 0) & (rows >= 0)
        where = np.nonzero(keep)[0]
        parts.append((rows[keep].astype(np.int32), where + start, acts[keep]))
        seqs.append(batch.seq_id.numpy())
        positions.append(batch.pos.numpy())
        tokens.append(batch.token_id.numpy())
        start += acts.shape[0]
    if not start:
        raise BadInputError(
            f"The activation cache holds no row of the split {split!r}.",
            "Interpretation needs held-out text.",
            "Raise `ingest`'s budget for this split and run again.",
        )
    grid, cell_of = _grid(
        split,
        np.concatenate(seqs).astype(np.int64),
        np.concatenate(positions).astype(np.int64),
        np.concatenate(tokens).astype(np.int64),
        reader.meta.context_length,
    )
    rows, where, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    matrix = _sorted_csr((values, (rows, cell_of[where])), (wanted.size, grid.num_cells))
    return SplitFirings(grid, Firings(wanted, matrix))


def with_documents(grid: TokenGrid, table: pa.Table) -> TokenGrid:
    """Add document ids, and the tokens of uncached positions, from `ingest`'s token table.

    Args:
        table: columns seq_id, input_ids, doc_ids, doc_starts of the same split.
    """
    row_of = {int(seq): row for row, seq in enumerate(table["seq_id"].to_numpy())}
    tokens, docs = grid.tokens.copy(), grid.docs.copy()
    for row, seq in enumerate(grid.seq_ids):
        at = row_of[int(seq)]
        ids = np.asarray(table["input_ids"][at].as_py(), np.int64)
        starts = np.asarray(table["doc_starts"][at].as_py(), np.int64)
        names = np.asarray(table["doc_ids"][at].as_py(), np.int64)
        tokens[row, : ids.size] = ids
        docs[row] = names[np.searchsorted(starts, np.arange(grid.num_positions), "right") - 1]
    return replace(grid, tokens=tokens, docs=docs)


def document_folds(grid: TokenGrid, num_folds: int) -> IntArray:
    """[S, T] fold 0..num_folds-1 of each cell, the same for all cells of a document.

    Documents are dealt in the order of their size (largest first, to the smallest fold), so that
    folds are of similar size even when few documents are long.
    """
    ids, inverse, sizes = np.unique(grid.docs, return_inverse=True, return_counts=True)
    fold_of, load = np.zeros(ids.size, np.int64), np.zeros(num_folds, np.int64)
    for index in np.argsort(-sizes, kind="stable"):
        fold_of[index] = load.argmin()
        load[fold_of[index]] += sizes[index]
    return fold_of[inverse.reshape(grid.docs.shape)]


def _grid(
    split: str, seqs: IntArray, positions: IntArray, tokens: IntArray, num_positions: int
) -> tuple[TokenGrid, IntArray]:
    """The grid of activation rows, and the cell of each row."""
    seq_ids, row = np.unique(seqs, return_inverse=True)
    shape = (seq_ids.size, num_positions)
    cell = row * num_positions + positions
    grid_tokens = np.full(shape, UNKNOWN, np.int64)
    valid = np.zeros(shape, bool)
    grid_tokens.reshape(-1)[cell] = tokens
    valid.reshape(-1)[cell] = True
    docs = np.full(shape, UNKNOWN, np.int64)
    return TokenGrid(split, seq_ids, grid_tokens, valid, docs), cell


def _sorted_csr(entries: Any, shape: tuple[int, int]) -> sparse.csr_array:
    matrix = sparse.csr_array(entries, shape=shape)
    matrix.sort_indices()
    return matrix
