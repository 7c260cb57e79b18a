"""Token shards: exact round trip, clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rldecoder.data.packing import PackedSequence, TokenShardWriter
from rldecoder.data.shards import read_token_table, read_tokens, token_schema
from rldecoder.errors import BadInputError, DamagedFileError


def write(folder: Path, ids: np.ndarray, vocab_size: int, shard_sequences: int = 2) -> None:
    writer = TokenShardWriter(folder, "train", vocab_size, shard_sequences)
    for row, sequence in enumerate(ids):
        writer.add([PackedSequence("s", [row, row + 1], [0, 2], sequence)])
    writer.close()


@pytest.mark.parametrize(("vocab_size", "kind"), [(1 << 16, "uint16"), ((1 << 16) + 1, "int32")])
def test_round_trip(tmp_path: Path, vocab_size: int, kind: str) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, (5, 4))
    ids[0, 0] = vocab_size - 1
    write(tmp_path, ids, vocab_size)
    assert str(token_schema(vocab_size).field("input_ids").type.value_type) == kind
    assert len(list(tmp_path.glob("train-*.parquet"))) == 3
    got = read_tokens(tmp_path, "train")
    assert got.dtype == np.int64
    assert np.array_equal(got, ids)
    assert np.array_equal(read_tokens(tmp_path, "train", 3), ids[:3])
    table = read_token_table(tmp_path, "train")
    assert table.column("seq_id").to_pylist() == list(range(5))
    assert table.column("doc_ids").to_pylist()[3] == [3, 4]
    assert table.column("doc_starts").to_pylist()[3] == [0, 2]


def test_missing_split_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"ingest\.budget_tokens\.label"):
        read_tokens(tmp_path, "label")


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, np.zeros((2, 4), np.int64), 100)
    path = tmp_path / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedFileError, match="train-00000"):
        read_tokens(tmp_path, "train")


def test_sequences_of_different_lengths_are_damage(tmp_path: Path) -> None:
    write(tmp_path, np.zeros((2, 4), np.int64), 100)
    writer = TokenShardWriter(tmp_path, "train", 100, 1)
    writer._num_shards = 1
    writer.add([PackedSequence("s", [0], [0], np.zeros(3, np.int64))])
    with pytest.raises(DamagedFileError, match=r"\[3, 4\]"):
        read_tokens(tmp_path, "train")
