"""Reading and writing Parquet and JSON: schemas that are checked, errors that name the file.

Columns shared by several stages have their schema here; a schema that only one stage writes
lives with that stage's subject package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from rldecoder.errors import DamagedFileError, NumericalError

Scalar = float | int | str | bool | None
"""A headline number, word or mark of a manifest."""

CURVES = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
"""Training curves: one row a (step, metric). `step` counts optimiser steps (or rollouts)."""

DENSITY = pa.schema([("latent", pa.int32()), ("density", pa.float64())])
"""Share of held-out tokens on which each latent is active, 0 to 1."""


def write_parquet(
    path: Path,
    columns: Mapping[str, np.ndarray[Any, Any] | pa.Array | Sequence[Any]],
    schema: pa.Schema,
    *,
    compression: str = "zstd",
) -> None:
    """Write one Parquet file with exactly `schema`.

    Raises:
        ValueError: a column is missing, superfluous, or of another length.
    """
    if set(columns) != set(schema.names):
        raise ValueError(f"columns {sorted(columns)} do not match schema {sorted(schema.names)}")
    arrays = []
    for field in schema:
        values = columns[field.name]
        arrays.append(
            values.cast(field.type)
            if isinstance(values, pa.Array | pa.ChunkedArray)
            else pa.array(values, type=field.type)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression=compression)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file.

    Raises:
        DamagedFileError: the file is missing, truncated, or lacks a column.
    """
    if not path.exists():
        raise DamagedFileError(
            f"{path} does not exist.", "", "Rerun the stage that publishes it: `rldecoder run`."
        )
    try:
        return pq.read_table(path, columns=list(columns) if columns is not None else None)
    except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError, OSError) as error:
        raise DamagedFileError(
            f"{path} cannot be read as Parquet.",
            f"It is truncated, damaged, or of another schema ({error}).",
            "Delete the artifact's folder and run again; it will be rebuilt.",
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, flushed to disk.

    Raises:
        NumericalError: the value holds NaN or infinity, which JSON cannot carry.
    """
    try:
        text = json.dumps(
            value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_scalar
        )
    except ValueError as error:
        raise NumericalError(
            f"{path.name} was to hold NaN or infinity.",
            "A metric could not be computed.",
            "Store None together with the reason.",
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _scalar(value: Any) -> Any:
    """NumPy scalars as the Python numbers they are; nothing else is converted silently."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        DamagedFileError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFileError(
            f"{path} cannot be read as JSON.",
            str(error),
            "Delete the artifact's folder and run again; it will be rebuilt.",
        ) from error


class JsonFile(BaseModel):
    """A model that reads and writes its own JSON file; the base of `JsonRecord` and of records
    whose JSON is no object (with pydantic's RootModel)."""

    model_config = ConfigDict(frozen=True)

    def save(self, path: Path) -> None:
        """Write it, as `write_json` does.

        Raises:
            NumericalError: it holds NaN or infinity.
        """
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it back.

        Raises:
            DamagedFileError: the file is missing, no JSON, or of another form.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise DamagedFileError(
                f"{path} is not what this version publishes there.",
                str(error).splitlines()[0],
                "Delete the artifact's folder and run again; it will be rebuilt.",
            ) from error


class JsonRecord(JsonFile):
    """A published JSON object: frozen, closed, with a docstring under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
