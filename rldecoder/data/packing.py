"""Packing documents into sequences of one length, and writing them to shards."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from rldecoder.data.shards import write_token_shard


class PackedSequence(NamedTuple):
    """One sequence of exactly `context_length` tokens."""

    source: str
    """Source of its first document."""
    doc_ids: list[int]
    doc_starts: list[int]
    """Position in the sequence where each document (or its rest) begins."""
    input_ids: np.ndarray


class _Mark(NamedTuple):
    """Where a document begins in the stream of tokens."""

    offset: int
    doc_id: int
    source: str


class SequencePacker:
    """Lines documents up, each followed by an end-of-text token, and cuts equal sequences.

    The end-of-text token belongs to the document before it. What is left at the end and fills no
    sequence is dropped.
    """

    def __init__(self, context_length: int, max_sequences: int, eos_token_id: int) -> None:
        self._context_length, self._eos = context_length, eos_token_id
        self._max_tokens = max_sequences * context_length
        self._pending = np.empty(0, dtype=np.int64)
        self._pending_start = 0
        self._end = 0
        self._marks: list[_Mark] = []

    @property
    def full(self) -> bool:
        """Whether the budget is reached; further documents are not taken."""
        return self._end >= self._max_tokens

    def add(self, doc_id: int, source: str, token_ids: list[int]) -> int:
        """Append a document; returns how many of its tokens fit the budget."""
        space = self._max_tokens - self._end
        if space <= 0:
            return 0
        taken = np.array([*token_ids, self._eos][:space], dtype=np.int64)
        self._marks.append(_Mark(self._end, doc_id, source))
        self._pending = np.concatenate([self._pending, taken])
        self._end += len(taken)
        return min(len(taken), len(token_ids))

    def take(self) -> list[PackedSequence]:
        """All sequences that are complete by now; each is returned once."""
        length = self._context_length
        num_sequences = len(self._pending) // length
        sequences = []
        for row in range(num_sequences):
            start = self._pending_start + row * length
            sequences.append(
                self._sequence(start, self._pending[row * length : (row + 1) * length])
            )
        self._pending = self._pending[num_sequences * length :].copy()
        self._pending_start += num_sequences * length
        return sequences

    def _sequence(self, start: int, input_ids: np.ndarray) -> PackedSequence:
        stop = start + self._context_length
        # Documents that ended before this sequence are done with.
        while len(self._marks) > 1 and self._marks[1].offset <= start:
            self._marks.pop(0)
        inside = [mark for mark in self._marks if mark.offset < stop]
        return PackedSequence(
            inside[0].source,
            [mark.doc_id for mark in inside],
            [max(0, mark.offset - start) for mark in inside],
            input_ids,
        )


class TokenShardWriter:
    """Writes the sequences of one split, `shard_sequences` to a shard."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_sequences: int) -> None:
        self._folder, self._split, self._vocab_size = folder, split, vocab_size
        self._shard_sequences = shard_sequences
        self._pending: list[PackedSequence] = []
        self._num_shards = 0
        self.num_sequences = 0
        """Sequences given to the writer so far."""

    def add(self, sequences: list[PackedSequence]) -> None:
        """Append sequences; full shards are written at once."""
        self._pending += sequences
        self.num_sequences += len(sequences)
        while len(self._pending) >= self._shard_sequences:
            self._write(self._shard_sequences)

    def close(self) -> None:
        """Write what is left."""
        if self._pending:
            self._write(len(self._pending))

    def _write(self, count: int) -> None:
        rows, self._pending = self._pending[:count], self._pending[count:]
        first = self.num_sequences - len(self._pending) - count
        flat = np.concatenate([row.input_ids for row in rows])
        offsets = np.arange(count + 1, dtype=np.int32) * len(rows[0].input_ids)
        columns = {
            "seq_id": np.arange(first, first + count, dtype=np.int32),
            "split": [self._split] * count,
            "source": [row.source for row in rows],
            "doc_ids": [row.doc_ids for row in rows],
            "doc_starts": [row.doc_starts for row in rows],
            "input_ids": pa.ListArray.from_arrays(offsets, flat),
        }
        write_token_shard(self._folder, self._split, self._num_shards, columns, self._vocab_size)
        self._num_shards += 1
