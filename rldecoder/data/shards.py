"""Token sequences on disk: Parquet shards per split, all sequences of one length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.json_records import Columns
from rldecoder.schemas import count_rows, read_parquet, table_schema, write_parquet

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "validation", "label", "test", "ood")
"""train fits; validation chooses checkpoints; labels are fitted on label; gates and evaluations
read test; ood is another kind of text."""


class DocumentRow(NamedTuple):
    """A document, or the piece of one, in the corpus."""

    doc_id: int
    split: str
    source: str
    licence: str
    title: str
    num_tokens: int
    """Kept, without the EOS."""
    sha256: str
    """Of the cleaned text in UTF-8."""


DOCUMENTS = table_schema(DocumentRow)
"""Documents of which tokens were kept: a `DocumentRow` each."""


def token_schema(vocab_size: int) -> pa.Schema:
    """Columns of a token shard; ids take two bytes where the vocabulary allows.

    `seq_id` counts from 0 within a split and is the row of `read_tokens`. `doc_starts[i]` is the
    position where (the part of) document `doc_ids[i]` begins, so `doc_starts[0] == 0`.
    """
    ids = pa.uint16() if vocab_size <= 1 << 16 else pa.int32()
    return pa.schema(
        [
            ("seq_id", pa.int32()),
            ("split", pa.string()),
            ("source", pa.string()),
            ("doc_ids", pa.list_(pa.int32())),
            ("doc_starts", pa.list_(pa.int32())),
            ("input_ids", pa.list_(ids)),
        ]
    )


def write_token_shard(
    folder: Path, split: str, index: int, columns: Columns, vocab_size: int
) -> None:
    """Write one shard of sequences (columns of `token_schema`)."""
    path = folder / f"{split}-{index:05d}.parquet"
    write_parquet(path, columns, token_schema(vocab_size))


def read_token_table(folder: Path, split: str) -> pa.Table:
    """All sequences of a split with the columns of `token_schema`.

    Raises:
        BadInputError: if the artifact holds no such split.
        DamagedFileError: if a shard cannot be read.
    """
    return pa.concat_tables([read_parquet(path) for path in _shards_of(folder, split)])


def _shards_of(folder: Path, split: str) -> list[Path]:
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    if not paths:
        raise BadInputError(
            f"The tokens in {folder} hold no split `{split}`.",
            "Its budget was 0.",
            f"Give `ingest.budget_tokens.{split}` a value above 0.",
        )
    return paths


class SplitSequences:
    """A split's sequences, read a few at a time: memory does not grow with the split.

    Args:
        split: one of `SPLITS`.

    Raises:
        BadInputError: the artifact holds no such split.
        DamagedFileError: a shard cannot be read.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._paths = _shards_of(folder, split)
        self._ends = np.cumsum([count_rows(path) for path in self._paths])
        self._held: tuple[int, pa.Table] | None = None
        self.num_sequences = int(self._ends[-1])
        self.length = self.read(0, 1).shape[1]
        """Tokens of each."""

    def read(self, first: int, count: int) -> np.ndarray:
        """Token ids [B, T] int64 of the sequences `first` to `first + count`, which exist."""
        parts = []
        for number, end in enumerate(self._ends.tolist()):
            start = 0 if number == 0 else int(self._ends[number - 1])
            if start < first + count and end > first:
                rows = slice(max(first, start) - start, min(first + count, end) - start)
                parts.append(self._table(number)[rows])
        return _as_matrix(pa.concat_tables(parts), self._split, self._folder)

    def _table(self, number: int) -> pa.Table:
        """A shard; the last one is kept, for the next sequences are most often in it, too."""
        if self._held is None or self._held[0] != number:
            self._held = number, read_parquet(self._paths[number], ["input_ids"])
        return self._held[1]


def read_tokens(folder: Path, split: str, max_sequences: int | None = None) -> np.ndarray:
    """Token ids of a split as int64 [S, T]; row number is `seq_id`.

    Args:
        split: one of `SPLITS`.
        max_sequences: read only the first sequences (None: all).

    Raises:
        BadInputError: if the artifact holds no such split.
        DamagedFileError: if a shard cannot be read or its sequences differ in length.
    """
    table = read_token_table(folder, split)
    if max_sequences is not None:
        table = table.slice(0, max_sequences)
    return _as_matrix(table, split, folder)


def _as_matrix(table: pa.Table, split: str, folder: Path) -> np.ndarray:
    lists = table.column("input_ids").combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = np.unique(lists.value_lengths().to_numpy(zero_copy_only=False))
    if len(lengths) != 1:
        raise DamagedFileError(
            f"Sequences of split `{split}` in {folder} have lengths {lengths.tolist()}.",
            "All sequences of an ingestion have the same length, so a shard is damaged.",
            "Delete the artifact's folder and run again; it will be rebuilt.",
        )
    return flat.reshape(len(table), int(lengths[0]))


def first_sequences(folder: Path, split: str, num_tokens: int, at_least: int = 1) -> Tensor:
    """The first whole sequences [S, T] of a split that hold `num_tokens`, or `at_least` so many."""
    import torch  # here: what only looks at a corpus needs none

    length = read_tokens(folder, split, 1).shape[1]
    return torch.from_numpy(read_tokens(folder, split, max(at_least, num_tokens // length)))
