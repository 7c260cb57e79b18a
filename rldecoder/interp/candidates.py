"""Candidate predicates of many latents at once, by counting.

For each atom that a predicate may use, two counts decide how good it is: on how many cells it
holds (`total`) and on how many of those the latent fires (`hits`). Atoms about one token are
counted per token id first, [K, V] firings a token, and then per class or affix with one sparse
product; no loop runs over cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rldecoder.config.interp import PredicateSettings
from rldecoder.interp.corpus import Firings, TokenGrid
from rldecoder.interp.predicate import (
    Affix,
    Atom,
    NgramIn,
    PositionRange,
    TextState,
    TokenClass,
    TokenIn,
    shifted,
)
from rldecoder.interp.text_state import TEXT_STATES
from rldecoder.interp.vocabulary import TOKEN_CLASSES, Side, Vocabulary

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
POSITION_BOUNDS = (2, 3, 5, 9, 17, 33)
SMOOTHING = 0.5
MIN_HITS = 2
"""A token or n-gram is considered if the latent fires on it at least so often."""
MAX_AFFIX_LENGTH = 4
"""Longest prefix or suffix, in characters."""
MIN_AFFIX_TOKENS = 4
"""An affix is considered if so many different tokens of the text share it."""
KEEP_CLASSES = 4
"""Classes and affixes kept per latent and offset for the combination search."""
TOKEN_PENALTY = 0.002
"""Subtracted from the objective for each further token or n-gram in an atom."""
ROWS_AT_ONCE = 64
"""Latents whose counts over all atoms are laid out at a time; changes memory, not results."""


class AtomTable(NamedTuple):
    """Atoms with their counts. C atoms."""

    atoms: list[Atom]
    hits: sparse.csr_array | FloatArray
    """[K, C] cells where the latent fires and the atom holds."""
    totals: FloatArray
    """[C] cells where the atom holds."""


def objective(kind: str, hits: Any, totals: Any, firing: Any, cells: float) -> FloatArray:
    """F1 or balanced accuracy from counts; arguments broadcast.

    Args:
        hits: cells where predicate and latent agree on yes.
        totals: cells where the predicate holds.
        firing: cells where the latent fires.
        cells: all cells.
    """
    hits, totals = np.asarray(hits, float), np.asarray(totals, float)
    if kind == "f1":
        return 2 * hits / np.maximum(totals + firing, 1)
    recall = hits / np.maximum(firing, 1)
    false_alarm = (totals - hits) / np.maximum(cells - np.asarray(firing, float), 1)
    return 0.5 * (recall + 1 - false_alarm)


def log_odds(hits: FloatArray, totals: FloatArray, firing: float, cells: float) -> FloatArray:
    """Smoothed log-odds ratio of an atom under firing against not firing (Jeffreys 0.5)."""
    missed, false = firing - hits, totals - hits
    quiet = cells - firing - false
    s = SMOOTHING
    return np.log((hits + s) / (missed + s)) - np.log((false + s) / (quiet + s))


def find_candidates(
    grid: TokenGrid, firings: Firings, vocabulary: Vocabulary, settings: PredicateSettings
) -> list[list[Atom]]:
    """The best atoms of every latent, each kind at each offset on its own.

    Returns one list per row of `firings`; empty for a latent that never fires on valid cells.
    """
    binary = _binary(firings, grid)
    firing = np.diff(binary.indptr).astype(float)
    num_cells = float(grid.cells.size)
    found: list[list[Atom]] = [[] for _ in firing]
    for offset in settings.offsets:
        tokens = shifted(grid.tokens, offset).reshape(-1)[grid.cells]
        counts, totals = _counts(binary, tokens, vocabulary.size)
        for row, ids in enumerate(_best_sets(counts, totals, firing, num_cells, settings)):
            if ids.size:
                found[row].append(TokenIn(tokens=tuple(ids.tolist()), offset=offset))
        table = _class_atoms(counts, totals, offset, vocabulary, settings)
        _add_best(found, table, firing, num_cells, settings)
    _add_bigrams(found, binary, grid, firing, vocabulary.size, settings)
    _add_best(found, _position_atoms(binary, grid), firing, num_cells, settings)
    # By themselves they name much more than a latent fires on: what counts is what they join.
    states: list[Atom] = [TextState(name=name) for name in TEXT_STATES]
    for atoms in found:
        if atoms:
            atoms += states
    return found


def _binary(firings: Firings, grid: TokenGrid) -> sparse.csr_array:
    """[K, valid cells] 1.0 where a latent fires, columns renumbered to valid cells only."""
    matrix = firings.matrix[:, grid.cells]
    out = sparse.csr_array(matrix)
    out.data = np.ones(out.data.size)
    return out


def _counts(
    binary: sparse.csr_array, codes: IntArray, num_codes: int
) -> tuple[sparse.csr_array, FloatArray]:
    """[K, codes] firings per code, and [codes] cells per code. Negative codes are left out."""
    known = np.flatnonzero(codes >= 0)
    onehot = sparse.csr_array(
        (np.ones(known.size), (known, codes[known])), shape=(codes.size, num_codes)
    )
    totals = np.bincount(codes[known], minlength=num_codes).astype(float)
    return sparse.csr_array(binary @ onehot), totals


def _best_sets(
    counts: sparse.csr_array,
    totals: FloatArray,
    firing: FloatArray,
    num_cells: float,
    settings: PredicateSettings,
) -> list[IntArray]:
    """For each latent, the codes that together are the best set: best log-odds first, cut where
    the objective is largest."""
    out = []
    for row in range(firing.size):
        part = slice(counts.indptr[row], counts.indptr[row + 1])
        ids, hits = counts.indices[part].astype(np.int64), counts.data[part]
        ids, hits = ids[hits >= MIN_HITS], hits[hits >= MIN_HITS]
        if ids.size == 0:
            out.append(np.empty(0, np.int64))
            continue
        total = totals[ids]
        odds = log_odds(hits, total, firing[row], num_cells)
        # The cap keeps codes that carry firings: many rare ones would beat them on odds alone.
        kept = np.argsort(-hits * (odds > 0), kind="stable")[: settings.max_tokens]
        order = kept[np.argsort(-odds[kept], kind="stable")]
        score = objective(
            settings.objective,
            hits[order].cumsum(),
            total[order].cumsum(),
            firing[row],
            num_cells,
        ) - TOKEN_PENALTY * np.arange(order.size)
        out.append(ids[order[: int(score.argmax()) + 1]])
    return out


def _class_atoms(
    counts: sparse.csr_array,
    totals: FloatArray,
    offset: int,
    vocabulary: Vocabulary,
    settings: PredicateSettings,
) -> AtomTable:
    """Classes and affixes, counted through the tokens that occur in the text."""
    seen = np.flatnonzero(totals)
    rows: list[int] = []
    columns: list[int] = []
    atoms: list[Atom] = []
    for name in TOKEN_CLASSES:
        members = np.flatnonzero(vocabulary.class_table(name)[seen])
        rows += members.tolist()
        columns += [len(atoms)] * members.size
        atoms.append(TokenClass(name=name, offset=offset))
    members_of: dict[tuple[Side, str], list[int]] = {}
    for index, token in enumerate(seen.tolist()):
        for key in vocabulary.affixes(token, MAX_AFFIX_LENGTH):
            members_of.setdefault(key, []).append(index)
    for side, text in sorted(members_of):
        held = members_of[side, text]
        if len(held) >= MIN_AFFIX_TOKENS:
            rows += held
            columns += [len(atoms)] * len(held)
            atoms.append(Affix(side=side, text=text, offset=offset))
    member = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(seen.size, len(atoms)))
    return AtomTable(atoms, sparse.csr_array(counts[:, seen] @ member), totals[seen] @ member)


def _position_atoms(binary: sparse.csr_array, grid: TokenGrid) -> AtomTable:
    """Early positions in the sequence, [0, bound)."""
    position = grid.cells % grid.num_positions
    bounds = [bound for bound in POSITION_BOUNDS if bound < grid.num_positions]
    holds = np.stack([position < bound for bound in bounds], axis=1).astype(float)
    atoms: list[Atom] = [PositionRange(low=0, high=bound) for bound in bounds]
    return AtomTable(atoms, binary @ holds, holds.sum(0))


def _add_best(
    found: list[list[Atom]],
    table: AtomTable,
    firing: FloatArray,
    num_cells: float,
    settings: PredicateSettings,
) -> None:
    """Append to each latent the KEEP_CLASSES atoms of the table with the best objective."""
    # Some latents at a time: a text has tens of thousands of affixes, mostly without hits.
    for start in range(0, firing.size, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rows = table.hits[part]
        hits = rows if isinstance(rows, np.ndarray) else np.asarray(rows.toarray())
        score = objective(
            settings.objective, hits, table.totals[None, :], firing[part, None], num_cells
        )
        for row, order in enumerate(np.argsort(-score, axis=1, kind="stable")):
            best = order[:KEEP_CLASSES]
            kept = [table.atoms[i] for i in best if hits[row, i] >= MIN_HITS]
            found[start + row] += kept


def _add_bigrams(
    found: list[list[Atom]],
    binary: sparse.csr_array,
    grid: TokenGrid,
    firing: FloatArray,
    vocab_size: int,
    settings: PredicateSettings,
) -> None:
    """Append to each latent its best set of (previous, current) token pairs."""
    current = grid.tokens.reshape(-1)[grid.cells]
    previous = shifted(grid.tokens, -1).reshape(-1)[grid.cells]
    known = (current >= 0) & (previous >= 0)
    pairs, codes = np.unique(previous[known] * vocab_size + current[known], return_inverse=True)
    all_codes = np.full(current.size, -1, np.int64)
    all_codes[known] = codes
    counts, totals = _counts(binary, all_codes, max(pairs.size, 1))
    sets = _best_sets(counts, totals, firing, float(grid.cells.size), settings)
    for row, chosen in enumerate(sets):
        if chosen.size:
            ngrams = [divmod(int(pairs[code]), vocab_size) for code in chosen]
            found[row].append(NgramIn(ngrams=tuple(ngrams)))
