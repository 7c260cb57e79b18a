"""Held-out text as arrays: the token grid of a split, and which latents fire where on it.

A *cell* is one position of one sequence; cells are numbered `row * T + position`. Everything
about a split (firings, predicates, windows) shares this numbering, so that counting is a product
of sparse matrices. Memory is bounded by the tokens whose firings are kept: 8 bytes a firing, and
about 20 bytes a cell. Of a long text the firings of a sample of its sequences may be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch, VectorColumn
from rldecoder.errors import BadInputError
from rldecoder.interp.predicate import UNKNOWN
from rldecoder.sae.model import Sae, SparseLatents

BoolArray = NDArray[np.bool_]
IntArray = NDArray[Any]
FloatArray = NDArray[np.float64]


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
        keep = valid[self.matrix.indices]
        return self if keep.all() else self.of(keep)

    def of(self, keep: BoolArray) -> Firings:
        """Only the firings that `keep` names, one flag for each entry of `matrix.data`."""
        matrix = self.matrix
        # By hand, because conversions between formats hold several copies of all firings.
        counts = [int(np.count_nonzero(keep[start:end])) for start, end in pairwise(matrix.indptr)]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(matrix.indptr.dtype)
        kept = (matrix.data[keep], matrix.indices[keep], starts)
        return Firings(self.latents, sparse.csr_array(kept, shape=matrix.shape))

    def select(self, rows: IntArray) -> Firings:
        """The firings of some rows, in the order given."""
        return Firings(self.latents[rows], self.matrix[rows])


class SplitFirings(NamedTuple):
    """One pass over a split."""

    grid: TokenGrid
    firings: Firings

    def only(self, sequences: IntArray) -> SplitFirings:
        """The part on some sequences, cells numbered anew.

        Args:
            sequences: ids that the grid holds, increasing.
        """
        grid, matrix = self.grid, self.firings.matrix
        rows = np.searchsorted(grid.seq_ids, sequences)
        part = TokenGrid(
            grid.split, grid.seq_ids[rows], grid.tokens[rows], grid.valid[rows], grid.docs[rows]
        )
        new = np.full(grid.seq_ids.size, UNKNOWN, np.int64)
        new[rows] = np.arange(rows.size)
        kept = self.firings.of(new[matrix.indices // grid.num_positions] >= 0).matrix
        row, position = np.divmod(kept.indices, grid.num_positions)
        # Cells keep their order, so each row's stay sorted.
        cells = (new[row] * grid.num_positions + position).astype(np.int32)
        shape = (matrix.shape[0], part.num_cells)
        moved = sparse.csr_array((kept.data, cells, kept.indptr), shape=shape)
        return SplitFirings(part, Firings(self.firings.latents, moved))


@torch.no_grad()
def read_firings(
    reader: ActivationReader,
    sae: Sae,
    *,
    split: str,
    latents: IntArray | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    sequences: IntArray | None = None,
    observe: Callable[[ActivationBatch, SparseLatents], None] | None = None,
    encoded: Iterator[SparseLatents] | None = None,
) -> SplitFirings:
    """Encode a split's cached residuals once and keep the firings of the latents of interest.

    Args:
        latents: [K] ids to keep; None keeps all of the dictionary.
        max_tokens: at most so many activation rows, from the split's start.
        batch_tokens: rows encoded at a time; changes memory, not results.
        sequences: only firings on these are kept; None keeps all. The grid holds all that was read.
        observe: called with each batch and its latents, all of the dictionary.
        encoded: the latents of each batch in turn, where they were computed before.

    Raises:
        BadInputError: the split has no activations.
    """
    wanted = np.arange(sae.num_latents) if latents is None else np.asarray(latents, np.int64)
    row_of = np.full(sae.num_latents, UNKNOWN, np.int64)
    row_of[wanted] = np.arange(wanted.size)
    chosen = None if sequences is None else np.asarray(sequences, np.int64)
    device = sae.W_enc.device

    seqs, positions, tokens = [], [], []
    kept_rows, kept_acts, counts = [], [], []
    columns: tuple[VectorColumn, ...] = ("resid",) if encoded is None else ()
    for batch in reader.ordered(batch_tokens, columns=columns, max_tokens=max_tokens):
        if encoded is not None:
            found = next(encoded)
        else:
            assert batch.resid is not None
            found = sae.encode(batch.resid.to(device).float())
        if observe is not None:
            observe(batch, found)
        acts, rows = found.acts.cpu().numpy(), row_of[found.indices.cpu().numpy()]
        keep = (acts > 0) & (rows >= 0)
        if chosen is not None:
            keep &= np.isin(batch.seq_id.numpy(), chosen)[:, None]
        kept_rows.append(rows[keep].astype(np.int32))
        kept_acts.append(acts[keep])
        counts.append(keep.sum(1, dtype=np.int32))
        seqs.append(batch.seq_id.numpy().astype(np.int32))
        positions.append(batch.pos.numpy().astype(np.int32))
        tokens.append(batch.token_id.numpy().astype(np.int32))
    if not seqs:
        raise BadInputError(
            f"The activation cache holds no row of the split {split!r}.",
            "Interpretation needs held-out text.",
            "Raise `ingest`'s budget for this split and run again.",
        )

    grid, cell_of = _grid(
        split, _joined(seqs), _joined(positions), _joined(tokens), reader.meta.context_length
    )
    # Rows of the cache lie in the order of their cells, so this is a matrix by columns already.
    ends = np.zeros(grid.num_cells + 1, np.int64)
    ends[cell_of + 1] = _joined(counts)
    by_cell = (_joined(kept_acts), _joined(kept_rows), ends.cumsum())
    shape = (wanted.size, grid.num_cells)
    matrix = sparse.csr_array(sparse.csc_array(by_cell, shape=shape).tocsr())
    return SplitFirings(grid, Firings(wanted, matrix))


def sample_sequences(
    table: pa.Table, tokens_each: int, *, of: int, size: int, seed: int
) -> IntArray | None:
    """Sequences whose firings are kept when only a part of the text may cost memory.

    Args:
        table: column seq_id of the split.
        tokens_each: most tokens read of a sequence.
        of: tokens that are read, from the split's start.
        size: tokens that are kept, at most.
        seed: the sample is uniform.

    Returns ids, increasing; or None, if all may be kept.
    """
    ids = np.sort(np.asarray(table["seq_id"], np.int64))[: -(-of // tokens_each)]
    if min(of, ids.size * tokens_each) <= size:
        return None
    count = max(1, size // tokens_each)
    return np.sort(np.random.default_rng(seed).choice(ids, count, replace=False))


def with_documents(grid: TokenGrid, table: pa.Table) -> TokenGrid:
    """Add document ids, and the tokens of uncached positions, from the token table.

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
    found, row = np.unique(seqs, return_inverse=True)
    seq_ids = found.astype(np.int64)
    shape = (seq_ids.size, num_positions)
    cell = row.astype(np.int64) * num_positions + positions
    grid_tokens = np.full(shape, UNKNOWN, np.int64)
    valid = np.zeros(shape, bool)
    grid_tokens.reshape(-1)[cell] = tokens
    valid.reshape(-1)[cell] = True
    docs = np.full(shape, UNKNOWN, np.int64)
    return TokenGrid(split, seq_ids, grid_tokens, valid, docs), cell


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """All parts in one array; the list is emptied, so that not both stay in memory."""
    out = np.concatenate(parts)
    parts.clear()
    return out
