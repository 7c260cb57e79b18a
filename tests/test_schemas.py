"""Parquet and JSON: exact round trips, clear errors for damage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rldecoder import schemas
from rldecoder.errors import DamagedFileError, NumericalError


def test_parquet_round_trip_keeps_types(tmp_path: Path) -> None:
    path = tmp_path / "density.parquet"
    schemas.write_parquet(
        path, {"latent": np.arange(3), "density": [0.0, 0.25, 1.0]}, schemas.DENSITY
    )
    table = schemas.read_parquet(path)
    assert table.schema.equals(schemas.DENSITY)
    assert table["density"].to_pylist() == [0.0, 0.25, 1.0]


def test_wrong_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not match"):
        schemas.write_parquet(tmp_path / "x.parquet", {"latent": [1]}, schemas.DENSITY)


@pytest.mark.parametrize("keep", [0, 1, 20])
def test_truncated_parquet_names_the_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "curves.parquet"
    schemas.write_parquet(
        path, {"step": [1], "name": pa.array(["loss"]), "value": [0.5]}, schemas.CURVES
    )
    path.write_bytes(path.read_bytes()[: -keep or None][: -1 if keep == 0 else None])
    with pytest.raises(DamagedFileError, match=r"curves\.parquet"):
        schemas.read_parquet(path)


class Row(NamedTuple):
    name: str
    count: int
    small: int
    share: float | None
    kind: Literal["a", "b"]
    holds: bool


class RowRecord(schemas.JsonRecord):
    step: int
    loss: float


def test_a_table_has_the_fields_of_its_rows() -> None:
    assert schemas.table_schema(Row, pa.float32(), small=pa.int8()) == pa.schema(
        [
            ("name", pa.string()), ("count", pa.int32()), ("small", pa.int8()),
            ("share", pa.float32()), ("kind", pa.string()), ("holds", pa.bool_()),
        ]
    )  # fmt: skip
    wanted = pa.schema([("step", pa.int32()), ("loss", pa.float64())])
    assert schemas.table_schema(RowRecord) == wanted


def test_missing_file_and_missing_column(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="does not exist"):
        schemas.read_parquet(tmp_path / "none.parquet")
    path = tmp_path / "x.parquet"
    schemas.write_parquet(path, {"latent": [1], "density": [0.1]}, schemas.DENSITY)
    with pytest.raises(DamagedFileError):
        schemas.read_parquet(path, columns=["absent"])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    schemas.write_json(path, value)
    assert schemas.read_json(path) == value


def test_json_takes_numpy_numbers_and_no_other_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    schemas.write_json(path, {"n": np.int64(3), "ok": np.bool_(True), "x": np.float32(0.5)})
    assert schemas.read_json(path) == {"n": 3, "ok": True, "x": 0.5}
    with pytest.raises(NumericalError):
        schemas.write_json(path, {"x": np.float32("nan")})
    with pytest.raises(TypeError, match=r"Path is not JSON"):
        schemas.write_json(path, {"p": path})


def test_json_refuses_nan_and_reads_no_garbage(tmp_path: Path) -> None:
    with pytest.raises(NumericalError):
        schemas.write_json(tmp_path / "x.json", {"kl": float("nan")})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DamagedFileError):
        schemas.read_json(tmp_path / "x.json")
