"""Reading cached activations: shuffled, in order, by sequences; resume and damage."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import (
    ActivationWriter,
    VectorColumn,
)
from rldecoder.errors import BadInputError, DamagedFileError
from tests.data.cached import D_MODEL, meta, rows, token_order, write


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 60),
    shard_rows=st.integers(1, 30),
    batch=st.integers(1, 25),
    window_rows=st.integers(1, 80),
    start=st.integers(0, 6),
)
def test_shuffled_is_a_permutation_that_resumes_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    shard_rows: int,
    batch: int,
    window_rows: int,
    start: int,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    write(folder, count, shard_rows)
    reader = ActivationReader(folder, "train", window_bytes=window_rows * (10 + 2 * D_MODEL))
    full = list(reader.shuffled(batch, seed=1, drop_last=False))
    assert sorted(token_order(full)) == list(range(count))
    resumed = list(reader.shuffled(batch, seed=1, start_batch=start, drop_last=False))
    assert token_order(resumed) == token_order(full[start:])
    if batch <= count:
        dropped = list(reader.shuffled(batch, seed=1))
        assert len(dropped) == reader.batches_per_epoch(batch) == count // batch
        assert token_order(dropped) == token_order(full)[: len(dropped) * batch]


def test_shuffled_rows_stay_together_and_epochs_differ(tmp_path: Path) -> None:
    data = write(tmp_path, 50, 10)
    reader = ActivationReader(tmp_path, "train")
    batches = list(reader.shuffled(10, seed=3, columns=("resid", "final_hidden")))
    order = token_order(batches)
    assert order != sorted(order)
    assert torch.equal(torch.cat([b.resid for b in batches]), data[3][order].to(torch.bfloat16))
    again = token_order(list(ActivationReader(tmp_path, "train").shuffled(10, seed=3)))
    assert again == order
    assert token_order(list(reader.shuffled(10, seed=3, epoch=1))) != order
    assert token_order(list(reader.shuffled(10, seed=4))) != order


def test_the_next_window_is_read_while_this_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 50, 10)
    reader = ActivationReader(tmp_path, "train", window_bytes=10 * (10 + 2 * D_MODEL))
    read: list[tuple[object, bool]] = []
    second = threading.Event()
    original = reader._read

    def watched(shards: tuple[int, ...], columns: Sequence[VectorColumn]) -> dict[str, Tensor]:
        read.append((shards, threading.current_thread() is threading.main_thread()))
        if len(read) == 2:
            second.set()
        return original(shards, columns)

    monkeypatch.setattr(reader, "_read", watched)
    batches = reader.shuffled(5, seed=1)
    next(batches)
    assert second.wait(10)  # nobody asked for it yet
    assert len(list(batches)) == 9
    assert [here for _, here in read] == [True, False, False, False, False]
    assert len({shards for shards, _ in read}) == 5


@pytest.mark.parametrize("limit", [1, 9, 10, 23, 50, 99])
def test_ordered_stops_at_max_tokens(tmp_path: Path, limit: int) -> None:
    write(tmp_path, 50, 10)
    batches = list(ActivationReader(tmp_path, "train").ordered(9, max_tokens=limit))
    assert token_order(batches) == list(range(min(limit, 50)))


@pytest.mark.parametrize("first", [0, 9, 10, 27, 49, 50])
def test_ordered_begins_at_any_row(tmp_path: Path, first: int) -> None:
    write(tmp_path, 50, 10)
    reader = ActivationReader(tmp_path, "train")
    assert token_order(list(reader.ordered(9, first=first))) == list(range(first, 50))
    assert token_order(list(reader.ordered(9, first=first, max_tokens=31))) == list(
        range(first, 31)
    )


def test_batch_larger_than_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 5, 10)
    with pytest.raises(BadInputError, match="larger than the split"):
        next(ActivationReader(tmp_path, "train").shuffled(6, seed=0))


def test_truncated_or_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, 30, 10)
    last = tmp_path / "train-00002.parquet"
    content = last.read_bytes()
    last.write_bytes(content[:-20])
    with pytest.raises(DamagedFileError, match="train-00002"):
        ActivationReader(tmp_path, "train")
    last.unlink()
    with pytest.raises(DamagedFileError, match="a shard is missing"):
        ActivationReader(tmp_path, "train")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"meta\.json"):
        ActivationReader(tmp_path, "train")


def test_shard_of_another_width_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10, 10)
    path = tmp_path / "meta.json"
    path.write_text(path.read_text().replace('"d_model": 8', '"d_model": 9'))
    with pytest.raises(DamagedFileError, match="columns"):
        ActivationReader(tmp_path, "train")


@pytest.mark.parametrize("size", [2, 4, 5])
@pytest.mark.parametrize("window_rows", [20, 45, 1000])
def test_sequences_come_whole_once_and_in_random_order(
    tmp_path: Path, window_rows: int, size: int
) -> None:
    data = write(tmp_path, 120, 20)  # 12 sequences of 10 rows, two in each shard
    window = window_rows * (24 + 2 * 2 * D_MODEL)
    reader = ActivationReader(tmp_path, "train", window_bytes=window)
    columns: tuple[VectorColumn, ...] = ("resid", "final_hidden")
    orders = []
    for epoch in (0, 0, 1):
        batches = list(reader.shuffled_sequences(size, seed=1, epoch=epoch, columns=columns))
        # Also where a window holds fewer sequences than a batch.
        assert len(batches) == reader.sequence_batches(size) == 12 // size
        order = []
        for batch in batches:
            assert batch.seq_id.reshape(size, 10).unique(dim=1).shape[1] == 1
            assert torch.equal(batch.pos.reshape(size, 10), torch.arange(1, 11).expand(size, 10))
            rows_read = batch.seq_id * 10 + batch.pos - 1
            assert torch.equal(batch.resid, data[3][rows_read].bfloat16())
            order += batch.seq_id[::10].tolist()
        assert len(set(order)) == len(order) == 12 // size * size
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]
    for start in range(1, 12 // size):
        late = list(reader.shuffled_sequences(size, seed=1, start_batch=start, columns=columns))
        assert [i for b in late for i in b.seq_id[::10].tolist()] == orders[0][size * start :]


def test_missing_sinks_leave_the_other_rows_of_their_sequence(tmp_path: Path) -> None:
    data = rows(60)
    kept = torch.ones(60, dtype=torch.bool)
    kept[[3, 40, 41]] = False
    with ActivationWriter(tmp_path, "train", meta(), 1000) as writer:
        writer.add(*(t[kept] for t in data))
    reader = ActivationReader(tmp_path, "train")
    assert reader.sequence_batches(4) == 1
    (batch,) = reader.shuffled_sequences(4, seed=0)
    for sequence in batch.seq_id.unique().tolist():
        mine = kept[sequence * 10 : sequence * 10 + 10].nonzero()[:, 0] + 1
        assert torch.equal(batch.pos[batch.seq_id == sequence], mine)
    with pytest.raises(BadInputError, match="6 sequences"):
        next(iter(reader.shuffled_sequences(7, seed=0)))
