"""Examples of the latents that are wanted, in one pass over text and in bounded memory.

A *window* is `window_tokens` neighbouring positions of a sequence, a *peak* the strongest cell of
a window for one latent. For each latent the pass keeps its strongest peaks, and a uniform sample
of all its peaks (those with the largest of pseudo-random priorities). Of the windows it
keeps a uniform sample, with the latents that fire in each. Memory therefore depends on the number
of latents, not on the length of the text; beside the encoder the work is a few scatters a batch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from rldecoder.data.activations import ActivationBatch
from rldecoder.interp.corpus import Firings, TokenGrid
from rldecoder.interp.examples import EXAMPLES, ExampleSettings
from rldecoder.json_records import Columns
from rldecoder.sae.selection import SparseLatents, join_latents

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
SAMPLE = 64
"""Peaks sampled a latent; the quantile examples come from them."""
WINDOWS = 512
"""Windows sampled in all; negatives and near misses come from them."""
DENSE_VALUES = 24_000_000
"""Most activations, zeros included, that are laid out at a time."""


class _Peaks:
    """The `size` peaks of each latent with the largest key, and the activations around them."""

    def __init__(self, num_latents: int, size: int, width: int) -> None:
        self.size = size
        self.key = np.full((num_latents, size), -np.inf)
        self.act = np.zeros((num_latents, size), np.float32)
        self.seq = np.full((num_latents, size), -1, np.int64)
        self.pos = np.zeros((num_latents, size), np.int64)
        self.around = np.zeros((num_latents, size, width), np.float32)

    def wanted(self, latent: IntArray, key: NDArray[Any]) -> IntArray:
        """Indices of the new peaks that belong among the kept ones."""
        if not self.size:
            return np.empty(0, np.int64)
        found = np.flatnonzero(key > self.key[latent, -1])
        order = found[np.lexsort((-key[found], latent[found]))]
        first = np.searchsorted(latent[order], latent[order])
        return order[np.arange(order.size) - first < self.size]

    def add(self, latent: IntArray, new: dict[str, NDArray[Any]]) -> None:
        """Merge new peaks: at most `size` a latent, sorted by latent, the largest key first."""
        ids, first, count = np.unique(latent, return_index=True, return_counts=True)
        row = np.repeat(np.arange(ids.size), count)
        column = np.arange(latent.size) - first[row]
        merged = {}
        for name, values in new.items():
            old = getattr(self, name)[ids]
            fresh = np.full_like(old, -np.inf if name == "key" else 0)
            fresh[row, column] = values
            merged[name] = np.concatenate([old, fresh], 1)
        best = np.argsort(-merged["key"], axis=1, kind="stable")[:, : self.size]
        for name, values in merged.items():
            getattr(self, name)[ids] = values[np.arange(ids.size)[:, None], best]


class PassResult(NamedTuple):
    """What one pass found."""

    table: pa.Table
    """The examples, with the schema `examples.EXAMPLES`."""
    density: NDArray[np.float64]
    """[K] share of tokens on which each latent fires."""


class ExamplePass:
    """Collects examples while text is encoded.

    Args:
        num_latents: L, all of the dictionary.
        settings: window width, and how many examples of each kind.
        context_length: positions of a sequence.
        seed: for the samples; the same text in the same order gives the same examples.
        latents: [K] ids of those that are wanted, in the order in which their examples are; None
            wants all. What a latent's examples are does not depend on the others.
    """

    def __init__(
        self,
        num_latents: int,
        settings: ExampleSettings,
        context_length: int,
        seed: int,
        latents: IntArray | None = None,
    ) -> None:
        self.settings, self.num_latents, self.context = settings, num_latents, context_length
        self.ids = np.arange(num_latents) if latents is None else np.asarray(latents, np.int64)
        wanted = len(self.ids)
        # Where each latent's own sums are; -1 for those that nobody wants.
        self._row_of = torch.full((num_latents,), -1, dtype=torch.int64)
        self._row_of[torch.from_numpy(self.ids)] = torch.arange(wanted)

        self.rng = np.random.default_rng(seed)
        self._salt = self.rng.integers(2**63, dtype=np.uint64)
        width = settings.window_tokens
        self.per_row = -(-context_length // width)
        self.top = _Peaks(wanted, settings.num_top, width)
        self.sample = _Peaks(wanted, SAMPLE if settings.num_quantile else 0, width)
        self.count = torch.zeros(wanted, dtype=torch.int64)
        self.num_tokens = 0
        # The sampled windows: priority, sequence, first position, and which latents fire there.
        self.windows = np.empty((0, 3))
        self.fires = np.zeros((0, wanted), bool)
        self._waiting: list[tuple[Tensor, Tensor, SparseLatents]] = []
        self._rows = max(context_length, DENSE_VALUES // max(num_latents, 1))
        self._dense = torch.zeros(0, wanted)

    def add(self, batch: ActivationBatch, latents: SparseLatents) -> None:
        """Take a batch of rows; sequences come one after the other, each in reading order.

        Args:
            batch: its seq_id and pos are read.
            latents: [N, K] what the SAE makes of it.
        """
        part = SparseLatents(latents.acts.float().cpu(), latents.indices.cpu())
        self._waiting.append((batch.seq_id, batch.pos, part))
        self._flush(last=False)

    def _flush(self, last: bool) -> None:
        """Work on all sequences that are complete."""
        seq = torch.cat([rows[0] for rows in self._waiting])
        pos = torch.cat([rows[1] for rows in self._waiting])
        latents = join_latents([rows[2] for rows in self._waiting])
        edges = torch.nonzero(torch.diff(seq, prepend=seq[:1] - 1)).reshape(-1).tolist()
        if last:
            edges.append(len(seq))
        first = 0
        for here, after in pairwise([*edges[1:], None]):
            # As many whole sequences as fit.
            if after is None or after - first > self._rows:
                span = slice(first, here)
                self._work(seq[span], pos[span], latents.of(span))
                first = here
        rest = slice(first, None)
        self._waiting = [(seq[rest], pos[rest], latents.of(rest))]

    def _work(self, seq: Tensor, pos: Tensor, latents: SparseLatents) -> None:
        """Some whole sequences."""
        acts, indices = latents
        names, local = np.unique(seq.numpy(), return_inverse=True)
        place = pos.numpy()
        window = local * self.per_row + place // self.settings.window_tokens
        self.num_tokens += len(seq)

        row, slot = torch.nonzero(acts > 0, as_tuple=True)
        latent, value = self._row_of[indices[row, slot]], acts[row, slot]
        row, latent, value = (x[latent >= 0] for x in (row, latent, value))
        self.count += torch.bincount(latent, minlength=len(self.ids))
        num_windows = int(names.size * self.per_row)
        key = latent * num_windows + torch.from_numpy(window)[row]
        peak = torch.zeros(len(self.ids) * num_windows)
        peak.scatter_reduce_(0, key, value, "amax")
        best = torch.nonzero(value == peak[key]).reshape(-1).numpy()
        if best.size > int((peak > 0).sum()):
            # Of equally strong cells in a window the first is the peak.
            best = best[np.unique(key.numpy()[best], return_index=True)[1]]
        rows, ids, strong = (x.numpy()[best] for x in (row, latent, value))

        # Which row holds each position of each sequence; the last entry stands for none.
        table = np.full((names.size, self.context), len(seq))
        table[local, place] = np.arange(len(seq))
        if len(self._dense) < len(seq) + 1:
            self._dense = torch.zeros(len(seq) + 1, len(self.ids))
        self._dense[row, latent] = value
        dense = self._dense.numpy()

        priority = self._priority(self.ids[ids], names[local[rows]], window[rows] % self.per_row)
        for kept, keys in ((self.top, strong), (self.sample, priority)):
            chosen = kept.wanted(ids, keys)
            at = rows[chosen]
            start = np.maximum(0, place[at] - self.settings.window_tokens // 2)
            offsets = start[:, None] + np.arange(self.settings.window_tokens)
            inside = table[local[at][:, None], np.minimum(offsets, self.context - 1)]
            inside = np.where(offsets < self.context, inside, len(seq))
            new = {
                "key": keys[chosen],
                "act": strong[chosen],
                "seq": names[local[at]],
                "pos": place[at],
                "around": dense[inside, ids[chosen][:, None]],
            }
            if chosen.size:
                kept.add(ids[chosen], new)
        self._dense[row, latent] = 0
        self._sample_windows(names, np.unique(window), peak.reshape(len(self.ids), -1))

    def _priority(self, latent: IntArray | int, seq: IntArray, part: IntArray) -> FloatArray:
        """A number in [0, 1) for each window (and latent), the same however text is batched.

        The finaliser of splitmix64 (Steele et al. 2014) over a counter that no two of them share.
        """
        counter = (seq * self.per_row + part) * (self.num_latents + 1) + latent
        x = counter.astype(np.uint64) + self._salt
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray((x ^ (x >> np.uint64(31))) >> np.uint64(11)) / 2.0**53

    def _sample_windows(self, names: IntArray, used: IntArray, peak: Tensor) -> None:
        """Let the windows of some sequences into the sample, as long as their priority allows."""
        sequence, part = np.divmod(used, self.per_row)
        priority = self._priority(self.num_latents, names[sequence], part)
        if len(self.windows) == WINDOWS:
            keep = priority > self.windows[-1, 0]
            used, priority = used[keep], priority[keep]
            sequence, part = sequence[keep], part[keep]
        new = np.stack([priority, names[sequence], part * self.settings.window_tokens], 1)
        fires = (peak[:, torch.from_numpy(used)] > 0).T.numpy()
        windows, masks = np.concatenate([self.windows, new]), np.concatenate([self.fires, fires])
        order = np.argsort(-windows[:, 0], kind="stable")[:WINDOWS]
        self.windows, self.fires = windows[order], masks[order]

    def finish(self, grid: TokenGrid) -> PassResult:
        """The examples; call it once, after the last batch.

        Args:
            grid: the tokens of the text that was read.
        """
        if self._waiting:
            self._flush(last=True)

        columns = _Columns(grid, self.ids, self.settings.window_tokens)
        rows, picks = np.nonzero(np.isfinite(self.top.key))
        columns.add_peaks("top", rows, picks, self.top)
        rows, picks, ranks = self._quantiles()
        columns.add_peaks("quantile", rows, picks, self.sample, ranks)

        row_of = np.searchsorted(grid.seq_ids, self.windows[:, 1].astype(np.int64))
        start = self.windows[:, 2].astype(np.int64)
        # A window counts as near by the sampled peaks that lie on one of its tokens.
        near = _near(self.sample, grid, row_of, start, self.settings.window_tokens)
        quiet = ~self.fires.T
        score = np.where(quiet, self.rng.random(quiet.shape), -np.inf)
        columns.add_windows("negative", score, self.settings.num_negative, row_of, start)
        score = np.where(quiet & (near > 0), near + 1e-6 * self.rng.random(quiet.shape), -np.inf)
        columns.add_windows("near_miss", score, self.settings.num_negative, row_of, start)
        density = self.count.numpy() / max(self.num_tokens, 1)
        return PassResult(columns.table(), density)

    def _quantiles(self) -> tuple[IntArray, IntArray, IntArray]:
        """One sampled peak from each equal part of those below the top: (row, column, rank)."""
        kept, top = self.sample, self.top
        number = self.settings.num_quantile
        empty = np.empty(0, np.int64)
        if not number:
            return empty, empty, empty
        cell = kept.seq * self.context + kept.pos
        strongest = top.seq * self.context + top.pos
        strongest[~np.isfinite(top.key)] = -1
        rest = np.isfinite(kept.key)
        rest &= ~(cell[:, :, None] == strongest[:, None, :]).any(2)
        order = np.argsort(-np.where(rest, kept.act, -np.inf), axis=1, kind="stable")
        count = rest.sum(1)[:, None]
        parts = np.maximum(np.minimum(number, count), 1)
        part = np.arange(number)[None]
        size = count // parts + (part < count % parts)
        first = part * (count // parts) + np.minimum(part, count % parts)
        drawn = first + (self.rng.random(size.shape) * size).astype(np.int64)
        row, rank = np.nonzero((part < parts) & (size > 0))
        return row, order[row, drawn[row, rank]], rank


def examples_of(
    grid: TokenGrid, firings: Firings, settings: ExampleSettings, seed: int
) -> pa.Table:
    """The examples of latents whose firings are known already; they lie on valid cells."""
    matrix = sparse.csr_array(firings.matrix.T)[grid.cells]
    counts = np.diff(matrix.indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    slots = np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], counts)
    acts = torch.zeros(len(counts), max(1, int(counts.max(initial=0))))
    indices = torch.zeros(acts.shape, dtype=torch.int64)
    acts[rows, slots] = torch.from_numpy(matrix.data)
    indices[rows, slots] = torch.from_numpy(matrix.indices.astype(np.int64))
    row, pos = np.divmod(grid.cells, grid.num_positions)
    where = torch.from_numpy(grid.seq_ids[row]), torch.from_numpy(pos)
    ids = torch.from_numpy(grid.tokens.reshape(-1)[grid.cells])
    found = ExamplePass(len(firings.latents), settings, grid.num_positions, seed)
    found.add(ActivationBatch(*where, ids, None, None), SparseLatents(acts, indices))
    table = found.finish(grid).table
    latent = firings.latents[table["latent"].to_numpy()].astype(np.int32)
    return table.set_column(0, EXAMPLES.field("latent"), pa.array(latent))


class _Columns:
    """Examples as columns, filled by kinds and sorted by latent at the end."""

    def __init__(self, grid: TokenGrid, ids: IntArray, width: int) -> None:
        self.grid, self.ids, self.width = grid, ids, width
        self.parts: list[tuple[str, IntArray, IntArray, Columns]] = []

    def add_peaks(
        self,
        kind: str,
        row: IntArray,
        column: IntArray,
        peaks: _Peaks,
        rank: IntArray | None = None,
    ) -> None:
        """Peaks (row, column) of the latents `ids[row]`."""
        pos = peaks.pos[row, column]
        values = {
            "grid_row": np.searchsorted(self.grid.seq_ids, peaks.seq[row, column]),
            "pos": pos,
            "act": peaks.act[row, column],
            "start": np.maximum(0, pos - self.width // 2),
            "acts": peaks.around[row, column],
        }
        self.parts.append((kind, row, column if rank is None else rank, values))

    def add_windows(
        self,
        kind: str,
        score: NDArray[np.float64],
        number: int,
        grid_row: IntArray,
        start: IntArray,
    ) -> None:
        """For each latent the `number` windows with the largest finite score [K, windows]."""
        order = np.broadcast_to(np.arange(score.shape[1]), score.shape)
        if number < score.shape[1]:
            order = np.argpartition(-score, number, axis=1)[:, :number]
        best = np.argsort(-np.take_along_axis(score, order, 1), axis=1, kind="stable")
        order = np.take_along_axis(order, best, 1)[:, :number]
        row, rank = np.nonzero(np.isfinite(np.take_along_axis(score, order, 1)))
        window = order[row, rank]
        values = {
            "grid_row": grid_row[window],
            "pos": start[window],
            "act": np.zeros(row.size, np.float32),
            "start": start[window],
            "acts": np.zeros((row.size, self.width), np.float32),
        }
        self.parts.append((kind, row, rank, values))

    def table(self) -> pa.Table:
        """All of it in the order of the latents asked for, kinds in the order they were added."""
        kind = np.concatenate([np.full(part[1].size, i) for i, part in enumerate(self.parts)])
        row, rank = (np.concatenate([part[i] for part in self.parts]) for i in (1, 2))
        values = {
            name: np.concatenate([part[3][name] for part in self.parts])
            for name in self.parts[0][3]
        }
        order = np.lexsort((rank, kind, row))

        # A window may reach beyond its sequence: what lies there is cut off.
        grid_row, start = values["grid_row"][order], values["start"][order]
        offsets = start[:, None] + np.arange(self.width)
        inside = offsets < self.grid.num_positions
        tokens = self.grid.tokens[grid_row[:, None], np.where(inside, offsets, 0)]
        names = pa.array([part[0] for part in self.parts])
        columns = {
            "latent": self.ids[row[order]],
            "kind": names.take(pa.array(kind[order])),
            "rank": rank[order],
            "seq_id": self.grid.seq_ids[grid_row],
            "pos": values["pos"][order],
            "act": values["act"][order],
            "start": start,
            "tokens": _lists(tokens.astype(np.int32), inside),
            "acts": _lists(values["acts"][order], inside),
        }
        arrays = [
            pa.array(columns[field.name]).cast(field.type)
            if isinstance(columns[field.name], np.ndarray)
            else columns[field.name]
            for field in EXAMPLES
        ]
        return pa.Table.from_arrays(arrays, schema=EXAMPLES)


def _lists(values: NDArray[Any], inside: NDArray[np.bool_]) -> pa.ListArray:
    """One list a row, of the values that lie inside."""
    ends = np.concatenate([[0], inside.sum(1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values[inside]))


def _near(
    sample: _Peaks, grid: TokenGrid, row: IntArray, start: IntArray, width: int
) -> NDArray[np.float64]:
    """[K, windows] share of a latent's sampled peaks that lie on a token of the window."""
    kept = np.isfinite(sample.key)
    latent, column = np.nonzero(kept)
    if not latent.size:
        return np.zeros((len(kept), row.size))
    at = np.searchsorted(grid.seq_ids, sample.seq[latent, column])
    fired = grid.tokens[at, sample.pos[latent, column]]
    offsets = start[:, None] + np.arange(width)
    inside = (offsets < grid.num_positions) & (offsets >= 0)
    shown = grid.tokens[row[:, None], np.minimum(offsets, grid.num_positions - 1)]
    valid = inside & grid.valid[row[:, None], np.minimum(offsets, grid.num_positions - 1)]
    vocabulary = int(max(fired.max(), shown.max())) + 1
    counts = sparse.csr_array((np.ones(fired.size), (latent, fired)), shape=(len(kept), vocabulary))
    window, _ = np.nonzero(valid)
    held = sparse.csr_array(
        (np.ones(window.size), (shown[valid], window)), shape=(vocabulary, row.size)
    )
    held.data[:] = 1
    return np.asarray((counts @ held).toarray()) / np.maximum(kept.sum(1), 1)[:, None]
