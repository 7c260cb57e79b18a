"""Reading activations: in order, or shuffled with bounded memory, from a cache on disk."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rldecoder.data.activations import (
    BYTES_PER_VALUE,
    ID_BYTES,
    ActivationBatch,
    ActivationMeta,
    VectorColumn,
    activation_schema,
    damaged_cache,
    read_meta,
)
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.seeds import torch_generator


class ShuffledActivations(ABC):
    """Rows of a split in a random order, with memory bounded by `window_bytes`.

    Args:
        meta: what the rows are.
        window_bytes: rows that are shuffled together occupy at most this much memory.
    """

    num_tokens: int
    """Rows of the split; at most so many where sinks have not been counted yet."""

    def __init__(self, meta: ActivationMeta, window_bytes: int) -> None:
        self.meta, self._window_bytes = meta, window_bytes

    @abstractmethod
    def _full_rows(self) -> list[int]:
        """Rows of each shard as if no sink had been left out: what windows are made by."""

    @abstractmethod
    def _rows(self, shard: int) -> int:
        """Rows of a shard."""

    @abstractmethod
    def _load(self, shards: tuple[int, ...], columns: Sequence[VectorColumn]) -> dict[str, Tensor]:
        """The columns of some shards' rows, ids included."""

    def _prepare(  # noqa: B027  (a hint, which a stream does not take)
        self, shards: tuple[int, ...], columns: Sequence[VectorColumn]
    ) -> None:
        """These shards are read next: a reader may start on them meanwhile."""

    def shuffled(
        self,
        batch_tokens: int,
        *,
        seed: int,
        epoch: int = 0,
        start_batch: int = 0,
        columns: Sequence[VectorColumn] = ("resid",),
        drop_last: bool = True,
    ) -> Iterator[ActivationBatch]:
        """One epoch in an order that depends on (seed, epoch) only.

        Shards are shuffled, then rows within windows of shards that fit `window_bytes`; a split
        that fits one window is shuffled fully. `start_batch` skips batches without reading the
        windows they lie in, and gives the same batches as an uninterrupted pass.

        Raises:
            BadInputError: if `drop_last` leaves no batch at all.
        """
        if drop_last and batch_tokens > self.num_tokens:
            raise BadInputError(
                f"A batch of {batch_tokens} tokens is larger than the split.",
                f"There are activations of {self.num_tokens} tokens.",
                "Lower the batch size or raise `cache_activations.budget_tokens`.",
            )
        return self._in_batches(
            "rows", batch_tokens, seed, epoch, start_batch, columns, drop_last=drop_last
        )

    def shuffled_sequences(
        self,
        batch_sequences: int,
        *,
        seed: int,
        epoch: int = 0,
        start_batch: int = 0,
        columns: Sequence[VectorColumn] = ("resid",),
    ) -> Iterator[ActivationBatch]:
        """One epoch of whole sequences, in an order that depends on (seed, epoch) only.

        A batch holds the rows of `batch_sequences` sequences, each in the order of its positions
        (sinks are missing from them); what fills no batch at the end of the epoch is left out.
        `start_batch` skips as in `shuffled`.

        Raises:
            BadInputError: the split has fewer sequences than a batch.
        """
        num_sequences = sum(self._sequences())
        if num_sequences < batch_sequences:
            raise BadInputError(
                f"A batch of {batch_sequences} sequences is larger than the split.",
                f"There are activations of {num_sequences} sequences.",
                "Lower the batch size or raise `cache_activations.budget_tokens`.",
            )
        return self._in_batches(
            "sequences", batch_sequences, seed, epoch, start_batch, columns, drop_last=True
        )

    def sequence_batches(self, batch_sequences: int) -> int:
        """Batches in one epoch of `shuffled_sequences`."""
        return sum(self._sequences()) // batch_sequences

    def _in_batches(
        self,
        unit: Literal["rows", "sequences"],
        size: int,
        seed: int,
        epoch: int,
        start_batch: int,
        columns: Sequence[VectorColumn],
        *,
        drop_last: bool,
    ) -> Iterator[ActivationBatch]:
        """Batches of `size` units each; what is left of a window goes into the next one's first."""
        windows = self._windows(columns, seed, epoch)
        units_of = self._rows if unit == "rows" else self._sequences().__getitem__
        carry: dict[str, Tensor] | None = None
        carried, skip = 0, start_batch * size
        for index, shards in enumerate(windows):
            num_units = sum(map(units_of, shards)) if skip else 0
            if num_units and skip >= num_units:
                skip -= num_units
                continue

            # The next window is read while this one is used.
            data = self._load(shards, columns)
            if index + 1 < len(windows):
                self._prepare(windows[index + 1], columns)

            units = _Rows(data) if unit == "rows" else _WholeSequences(data)
            order = torch.randperm(len(units), generator=torch_generator(seed, unit, epoch, index))
            order, skip = order[skip:], 0

            # What the last window left comes first, so that only an epoch's end can fall short.
            if carry is not None:
                more = order[: size - carried]
                added = units.take(more)
                carry = {k: torch.cat([carry[k], added[k]]) for k in carry}
                carried, order = carried + len(more), order[len(more) :]
                if carried < size:
                    continue
                yield _as_batch(carry)

            full = len(order) // size * size
            for start in range(0, full, size):
                yield _as_batch(units.take(order[start : start + size]))
            carried = len(order) - full
            carry = units.take(order[full:]) if carried else None

        if carry is not None and not drop_last:
            yield _as_batch(carry)

    def _sequences(self) -> list[int]:
        """Sequences of each shard."""
        return [rows // self._whole_sequence() for rows in self._full_rows()]

    def _whole_sequence(self) -> int:
        return self.meta.context_length - self.meta.skip_first

    def _windows(
        self, columns: Sequence[VectorColumn], seed: int, epoch: int
    ) -> list[tuple[int, ...]]:
        """Shard numbers, shuffled, in groups that fit the memory allowed (one shard at least)."""
        generator = torch_generator(seed, "shards", epoch)
        full_rows = self._full_rows()
        shuffled = torch.randperm(len(full_rows), generator=generator).tolist()
        width = ID_BYTES + len(columns) * BYTES_PER_VALUE * self.meta.d_model
        rows_allowed = max(1, self._window_bytes // width)
        windows: list[list[int]] = []
        rows = math.inf
        for shard in shuffled:
            if rows + full_rows[shard] > rows_allowed:
                windows.append([])
                rows = 0
            windows[-1].append(shard)
            rows += full_rows[shard]
        return [tuple(sorted(window)) for window in windows]


class ActivationReader(ShuffledActivations):
    """Reads one split of a cache, in order or shuffled."""

    def __init__(self, folder: Path, split: str, *, window_bytes: int = 1 << 29) -> None:
        """Open a split.

        Args:
            split: `train`, `validation`, `label`, `test` or `ood`.
            window_bytes: rows that are shuffled together occupy at most this much memory; the next
                ones are read meanwhile, and occupy as much again.

        Raises:
            BadInputError: if the cache holds no such split.
            DamagedFileError: if a shard is missing, truncated or not what `meta.json` says.
        """
        super().__init__(read_meta(folder), window_bytes)
        self.folder, self.split = folder, split
        if not self.meta.tokens.get(split):
            raise BadInputError(
                f"The activation cache {folder} holds no split `{split}`.",
                f"It has: {', '.join(sorted(self.meta.tokens)) or 'nothing'}.",
                f"Give `cache_activations.budget_tokens.{split}` a value above 0.",
            )
        self._paths = sorted(folder.glob(f"{split}-*.parquet"))
        self._shard_rows = [self._count_rows(path) for path in self._paths]
        self.num_tokens = sum(self._shard_rows)
        if self.num_tokens != self.meta.tokens[split]:
            raise DamagedFileError(
                f"Split `{split}` of {folder} has {self.num_tokens} rows in its shards.",
                f"`meta.json` says {self.meta.tokens[split]}: a shard is missing.",
                "Remove the artifact's folder; the next run rebuilds it.",
            )
        self._held: tuple[tuple[object, ...], dict[str, Tensor]] | None = None
        self._ahead: tuple[tuple[object, ...], Future[dict[str, Tensor]]] | None = None
        self._background = ThreadPoolExecutor(1, "read-ahead")

    def _count_rows(self, path: Path) -> int:
        try:
            footer = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise damaged_cache(path, error) from error
        if not footer.schema.to_arrow_schema().equals(activation_schema(self.meta.d_model)):
            raise damaged_cache(path, ValueError("its columns are not those of `meta.json`"))
        return int(footer.num_rows)

    def batches_per_epoch(self, batch_tokens: int) -> int:
        """Full batches in one shuffled pass (`drop_last=True`)."""
        return self.num_tokens // batch_tokens

    def first_row(self, seq_id: int) -> int:
        """Number of a sequence's first row, for `ordered`; that of the next one if it has none."""
        shard = bisect_left(self._paths, seq_id, key=lambda path: int(self._ids(path)[-1]))
        inside = 0
        if shard < len(self._paths):
            inside = int(np.searchsorted(self._ids(self._paths[shard]), seq_id))
        return sum(self._shard_rows[:shard]) + inside

    def _ids(self, path: Path) -> np.ndarray:
        """The sequence of each row of a shard."""
        try:
            return pq.read_table(path, columns=["seq_id"], memory_map=True)["seq_id"].to_numpy()
        except (OSError, pa.ArrowException) as error:
            raise damaged_cache(path, error) from error

    def _full_rows(self) -> list[int]:
        # A shard holds whole sequences, and far fewer sinks than a sequence has tokens.
        whole = self._whole_sequence()
        return [math.ceil(rows / whole) * whole for rows in self._shard_rows]

    def _rows(self, shard: int) -> int:
        return self._shard_rows[shard]

    def ordered(
        self,
        batch_tokens: int,
        *,
        columns: Sequence[VectorColumn] = ("resid",),
        max_tokens: int | None = None,
        first: int = 0,
    ) -> Iterator[ActivationBatch]:
        """Rows in (seq_id, pos) order; the last batch may be smaller.

        Args:
            batch_tokens: rows per batch.
            max_tokens: stop after this many rows, counted from the first of all (None: all).
            first: number of the row to begin at; shards before it are not read.
        """
        left = self.num_tokens if max_tokens is None else min(max_tokens, self.num_tokens)
        left -= first
        carry: dict[str, Tensor] | None = None
        for shard in range(len(self._paths)):
            if first >= self._shard_rows[shard]:
                first -= self._shard_rows[shard]
                continue
            data = self._load((shard,), columns)
            if shard + 1 < len(self._paths) and left > self._shard_rows[shard] - first:
                self._prepare((shard + 1,), columns)
            if carry is not None:
                data = {k: torch.cat([carry[k], v]) for k, v in data.items()}
            start, first = first, 0
            while left > 0 and len(data["pos"]) - start >= min(batch_tokens, left):
                stop = start + min(batch_tokens, left)
                yield _as_batch({k: v[start:stop] for k, v in data.items()})
                left -= stop - start
                start = stop
            if left <= 0:
                return
            carry = {k: v[start:] for k, v in data.items()}

    def _load(self, shards: tuple[int, ...], columns: Sequence[VectorColumn]) -> dict[str, Tensor]:
        """Rows of some shards; the last answer is kept, so a small split is read from disk once."""
        key = (shards, tuple(columns))
        if self._held is None or self._held[0] != key:
            self._held = None  # freed before another window is read
            ahead, self._ahead = self._ahead, None
            if ahead is not None and ahead[0] == key:
                self._held = (key, ahead[1].result())
            else:
                self._held = (key, self._read(shards, columns))
        return self._held[1]

    def _prepare(self, shards: tuple[int, ...], columns: Sequence[VectorColumn]) -> None:
        """Read the next window while this one is used; two are then in memory."""
        key = (shards, tuple(columns))
        self._ahead = (key, self._background.submit(self._read, shards, columns))

    def _read(self, shards: tuple[int, ...], columns: Sequence[VectorColumn]) -> dict[str, Tensor]:
        """Rows of some shards, from disk."""
        num_rows = sum(self._shard_rows[shard] for shard in shards)
        data = {name: torch.empty(num_rows, dtype=torch.int64) for name in _ID_COLUMNS}
        for vector in columns:
            data[vector] = torch.empty(num_rows, self.meta.d_model, dtype=torch.bfloat16)
        start = 0
        for shard in shards:
            path = self._paths[shard]
            try:
                table = pq.read_table(path, columns=[*_ID_COLUMNS, *columns], memory_map=True)
            except (OSError, pa.ArrowException) as error:
                raise damaged_cache(path, error) from error
            rows = slice(start, start + table.num_rows)
            for name in _ID_COLUMNS:
                data[name].numpy()[rows] = table.column(name).to_numpy()
            for vector in columns:
                # torch copies with all its threads, which the first touch of new memory needs.
                raw = torch.from_numpy(_from_binary(table.column(vector), self.meta.d_model))
                data[vector][rows].copy_(raw.view(torch.bfloat16))
            start += table.num_rows
        return data


class _Rows:
    """The rows of a window."""

    def __init__(self, data: Mapping[str, Tensor]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data["pos"])

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """These rows, in this order."""
        return {name: _rows_of(values, rows) for name, values in self._data.items()}


class _WholeSequences(_Rows):
    """The sequences of a window, each with its rows in order."""

    def __init__(self, data: Mapping[str, Tensor]) -> None:
        super().__init__(data)
        _, self._counts = torch.unique_consecutive(data["seq_id"], return_counts=True)
        self._starts = self._counts.cumsum(0) - self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def take(self, sequences: Tensor) -> dict[str, Tensor]:
        """The rows of these sequences, in this order."""
        starts, counts = self._starts[sequences], self._counts[sequences]
        ends = counts.cumsum(0)
        within = torch.arange(int(counts.sum())) - (ends - counts).repeat_interleave(counts)
        return super().take(starts.repeat_interleave(counts) + within)


def _rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """`values[rows]`; 16-bit rows are moved as 64-bit words, three times as fast on a CPU."""
    if values.ndim == 2 and values.dtype == torch.bfloat16 and values.shape[1] % 4 == 0:
        return values.view(torch.int64).index_select(0, rows).view(values.dtype)
    return values.index_select(0, rows)


_ID_COLUMNS = ("seq_id", "pos", "token_id")


def _from_binary(column: pa.ChunkedArray, d_model: int) -> np.ndarray:
    """Fixed-size binary values as int16 [N, d_model] (bfloat16 bit patterns)."""
    parts = []
    for chunk in column.chunks:
        flat = np.frombuffer(chunk.buffers()[1], dtype=np.int16)
        parts.append(flat[chunk.offset * d_model : (chunk.offset + len(chunk)) * d_model])
    joined = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int16), *parts])
    return joined.reshape(-1, d_model)


def _as_batch(data: Mapping[str, Tensor]) -> ActivationBatch:
    return ActivationBatch(
        data["seq_id"], data["pos"], data["token_id"], data.get("resid"), data.get("final_hidden")
    )
