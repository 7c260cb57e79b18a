"""Curves survive checkpoints and Parquet unchanged."""

from __future__ import annotations

from pathlib import Path

from rldecoder.curves import Curves, read_curves


def test_state_and_parquet_round_trip(tmp_path: Path) -> None:
    curves = Curves()
    curves.log(1, loss=2.0, fvu=0.5)
    resumed = Curves.model_validate_json(curves.model_dump_json())
    resumed.log(2, loss=1.0)
    assert resumed.last("loss") == 1.0
    assert resumed.last("fvu") == 0.5
    assert resumed.last("none") is None
    resumed.write(tmp_path / "curves.parquet")
    assert read_curves(tmp_path / "curves.parquet") == {
        "loss": ([1, 2], [2.0, 1.0]),
        "fvu": ([1], [0.5]),
    }
