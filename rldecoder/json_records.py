"""JSON files and records: written whole or not at all, read with errors that name the file.

Ground floor, without arrays: commands that only look import nothing slower than pydantic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rldecoder import files
from rldecoder.config.problems import problem_lines
from rldecoder.errors import DamagedFileError, NumericalError

Row = dict[str, Any]
"""One row of a table, a value for each column of its schema."""
Columns = Mapping[str, Any]
"""The columns of a table, each with a value for every row."""
Scalar = float | int | str | bool | None
"""A headline number, word or mark of a manifest."""


def optional() -> Any:
    """A field of a record that has no key in the JSON where it is None."""
    return Field(default=None, exclude_if=lambda value: value is None)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, flushed to disk: whole or not at all.

    Raises:
        NumericalError: the value holds NaN or infinity, which JSON cannot carry.
    """
    files.write_bytes(path, to_json(path, value))


def to_json(path: Path, value: Any) -> bytes:
    """What `write_json` writes; `path` is for the error's text."""
    try:
        text = _dumps(value, ensure_ascii=False)
    except ValueError as error:
        raise NumericalError(
            f"{path.name} was to hold NaN or infinity.",
            "A metric could not be computed.",
            "Store None together with the reason.",
        ) from error
    try:
        return (text + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, as file names can have: escaped
        return (_dumps(value, ensure_ascii=True) + "\n").encode()


def _scalar(value: Any) -> Any:
    """NumPy scalars as the Python numbers they are; nothing else is converted silently."""
    import numpy as np  # here, because most records hold none

    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


_dumps = partial(json.dumps, indent=2, sort_keys=True, allow_nan=False, default=_scalar)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        DamagedFileError: the file is missing, is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
                f"{problem_lines(error)[0]}.",
                "Delete the artifact's folder and run again; it will be rebuilt.",
            ) from error


class JsonRecord(JsonFile):
    """A published JSON object: frozen, closed, with a docstring under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
