"""Reading and writing Parquet: schemas that are checked, errors that name the file.

JSON is in `rldecoder.json_records`, whose names are found here, too.

Columns shared by several stages have their schema here; a schema that only one stage writes
lives with that stage's subject package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from rldecoder import files
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.json_records import Columns as Columns
from rldecoder.json_records import JsonFile as JsonFile
from rldecoder.json_records import JsonRecord as JsonRecord
from rldecoder.json_records import Row as Row
from rldecoder.json_records import Scalar as Scalar
from rldecoder.json_records import optional as optional
from rldecoder.json_records import read_json as read_json
from rldecoder.json_records import to_json as to_json
from rldecoder.json_records import write_json as write_json

CURVES = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
"""Training curves: one row a (step, metric). `step` counts optimiser steps (or rollouts)."""

DENSITY = pa.schema([("latent", pa.int32()), ("density", pa.float64())])
"""Share of held-out tokens on which each latent is active, 0 to 1."""


COLUMN_TYPES = {bool: pa.bool_(), int: pa.int32(), float: pa.float64(), str: pa.string()}


def table_schema(
    row: type[Any], floats: pa.DataType = COLUMN_TYPES[float], **types: pa.DataType
) -> pa.Schema:
    """The columns of a table with a class for its rows, a NamedTuple or a record: its fields.

    Args:
        floats: of all columns of floats.
        types: of columns by name that are not in COLUMN_TYPES.
    """
    names = row.model_fields if issubclass(row, BaseModel) else row._fields
    hints, known = get_type_hints(row), COLUMN_TYPES | {float: floats}
    return pa.schema([(n, types.get(n) or known[_plain_type(hints[n])]) for n in names])


def _plain_type(hint: Any) -> type:
    """The type behind `float | None` and `Literal["a", "b"]`."""
    first = next((part for part in get_args(hint) if part is not NoneType), hint)
    return first if isinstance(first, type) else type(first)


def write_parquet(
    path: Path,
    columns: Mapping[str, np.ndarray[Any, Any] | pa.Array | Sequence[Any]],
    schema: pa.Schema,
) -> None:
    """Write one Parquet file with exactly `schema`: whole or not at all.

    Raises:
        ValueError: a column is missing, superfluous, or of another length.
        BadInputError: a text is not Unicode (half a surrogate pair).
    """
    if set(columns) != set(schema.names):
        raise ValueError(f"columns {sorted(columns)} do not match schema {sorted(schema.names)}")
    arrays = []
    for field in schema:
        values = columns[field.name]
        try:
            arrays.append(
                values.cast(field.type)
                if isinstance(values, pa.Array | pa.ChunkedArray)
                else pa.array(values, type=field.type)
            )
        except UnicodeError as error:
            raise BadInputError(
                f"A text in column {field.name} of {path.name} is not Unicode.",
                str(error),
                "Mend the text: half a surrogate pair cannot be stored.",
            ) from error
    table = pa.Table.from_arrays(arrays, schema=schema)
    with files.aside(path) as draft:
        pq.write_table(table, draft, compression="zstd")


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file.

    Raises:
        DamagedFileError: the file is missing, truncated, lacks a column, or holds text that is
            not UTF-8.
    """
    if not path.exists():
        raise DamagedFileError(
            f"{path} does not exist.", "", "Rerun the stage that publishes it: `rldecoder run`."
        )
    try:
        # Not `read_table`: it imports pandas, half a second of every command.
        with pq.ParquetFile(path) as file:
            table = file.read(columns=list(columns) if columns is not None else None)
        table.validate(full=True)  # Parquet is read without a look at its text
        if columns is not None and (absent := set(columns) - set(table.column_names)):
            raise pa.ArrowKeyError(f"it has no column {', '.join(sorted(absent))}")
        return table
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from error


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, from its footer; raises DamagedFileError if that is none."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from error


def _no_parquet(path: Path, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"{path} cannot be read as Parquet.",
        f"It is truncated, damaged, or of another schema ({error}).",
        "Delete the artifact's folder and run again; it will be rebuilt.",
    )
