"""Packing documents into sequences of one length, and writing them to shards."""

from __future__ import annotations

from collections.abc import Sequence
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


class SequencePacker:
    """Lines documents up, with what parts them, and cuts equal sequences.

    The end-of-text token belongs to the document before it. What is left at the end and fills no
    sequence is dropped.

    Args:
        context_length: tokens of a sequence.
        end: what stands behind every document (`text_tokens.tokens_between`): an end-of-text
            token, or nothing where what stands in front of the next one parts them.
        front: what the tokenizer puts in front of every text, as a rule nothing or one
            beginning-of-text token. Every document begins with it, and so does every sequence:
            one that begins inside a document too, as the model never reads text without.
    """

    def __init__(
        self,
        context_length: int,
        max_sequences: int,
        end: Sequence[int],
        front: Sequence[int] = (),
    ) -> None:
        self._context_length = context_length
        self._max_sequences, self._front, self._end = max_sequences, [*front], [*end]
        self._num_sequences = 0
        self._done: list[PackedSequence] = []
        self._row: list[int] = []
        self._source = ""
        self._doc_ids: list[int] = []
        self._doc_starts: list[int] = []

    @property
    def full(self) -> bool:
        """Whether the budget is reached; further documents are not taken."""
        return self._num_sequences >= self._max_sequences

    def add(self, doc_id: int, source: str, token_ids: list[int]) -> int:
        """Append a document; returns how many of its tokens, those in front among them, fit."""
        tokens = [*self._front, *token_ids, *self._end]
        taken = 0
        while taken < len(tokens) and not self.full:
            if not self._row:
                self._source = source
            self._doc_ids.append(doc_id)
            self._doc_starts.append(len(self._row))
            if taken and not self._row:
                self._row += self._front
            part = tokens[taken : taken + self._context_length - len(self._row)]
            self._row += part
            taken += len(part)
            if len(self._row) == self._context_length:
                self._finish_row()
        return min(taken, len(tokens) - len(self._end))

    def take(self) -> list[PackedSequence]:
        """All sequences that are complete by now; each is returned once."""
        done, self._done = self._done, []
        return done

    def _finish_row(self) -> None:
        ids = np.array(self._row, dtype=np.int64)
        self._done.append(PackedSequence(self._source, self._doc_ids, self._doc_starts, ids))
        self._num_sequences += 1
        self._row, self._doc_ids, self._doc_starts = [], [], []


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
