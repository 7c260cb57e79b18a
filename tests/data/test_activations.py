"""Activation shards: exact round trip, what is refused, and their sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import (
    ActivationBatch,
    ActivationWriter,
    activation_schema,
    row_bytes,
)
from rldecoder.errors import BadInputError, NumericalError
from tests.data.cached import D_MODEL, meta, rows, write


def test_round_trip_is_exact_in_bfloat16(tmp_path: Path) -> None:
    data = write(tmp_path, 53, shard_rows=20)
    reader = ActivationReader(tmp_path, "train")
    assert sorted(p.name for p in tmp_path.glob("*.parquet")) == [
        f"train-0000{i}.parquet" for i in range(3)
    ]
    assert reader.num_tokens == 53
    assert reader.meta.tokens == {"train": 53}
    batches = list(reader.ordered(9, columns=("resid", "final_hidden")))
    assert [len(b.pos) for b in batches] == [9, 9, 9, 9, 9, 8]
    for index, expected in enumerate(data):
        got = torch.cat([b[index] for b in batches])
        want = expected.to(torch.bfloat16) if expected.is_floating_point() else expected
        assert torch.equal(got, want)
    assert next(reader.ordered(9)).final_hidden is None


def test_splits_share_a_folder(tmp_path: Path) -> None:
    write(tmp_path, 30, 10)
    write(tmp_path, 20, 10, split="test")
    assert ActivationReader(tmp_path, "test").meta.tokens == {"train": 30, "test": 20}
    with pytest.raises(BadInputError, match="no split `ood`"):
        ActivationReader(tmp_path, "ood")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused_and_writes_nothing(tmp_path: Path, bad: float) -> None:
    data = rows(5)
    data[4][2, 1] = bad
    with (
        pytest.raises(NumericalError, match="1 of 5 rows of `final_hidden`"),
        ActivationWriter(tmp_path, "train", meta(), 5) as writer,
    ):
        writer.add(*data)
    assert list(tmp_path.iterdir()) == []


def test_row_bytes_counts_the_schema() -> None:
    width = sum(field.type.bit_width // 8 for field in activation_schema(D_MODEL))
    assert row_bytes(D_MODEL) == width


def test_batch_moves_to_a_device() -> None:
    batch = ActivationBatch(*rows(3)[:4], None).to("cpu")
    assert batch.final_hidden is None
    assert batch.resid is not None
