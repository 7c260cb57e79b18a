"""The user's files: which kinds are read, how they are opened, and the rows they hold.

Bytes that are no UTF-8 come out as lone surrogates (Python's `surrogateescape`), one value at a
time: who reads the value asks `is_undecodable` and counts or refuses it. Nothing is replaced.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from rldecoder.data.documents import plain
from rldecoder.errors import BadInputError
from rldecoder.json_records import Row
from rldecoder.json_text import parse_json

if TYPE_CHECKING:  # slow to import; a plan only lists files
    import pyarrow as pa

Kind = Literal["text", "jsonl", "json", "csv", "parquet"]

KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""Suffixes, in lower case, of what is read; all but Parquet may be packed besides."""
PACKED = (".gz", ".bz2", ".zst")
KNOWN = f"{', '.join(KINDS)}; all but Parquet also packed as {', '.join(PACKED)}"

MAX_VALUE_CHARS = 1 << 29
"""A text file, a JSON file or a line that is longer is refused: a small packed file may hold a
thousand times its size, and one document of this length is a mistake."""
_ROWS_PER_READ = 256
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BINARY_LOOK = 8192


def kind_of(path: Path) -> Kind | None:
    """What a file is read as, by its suffix in any case; None when it is not read."""
    packed = path.suffix.lower() in PACKED
    kind = KINDS.get(_inner_suffix(path))
    return None if packed and kind == "parquet" else kind


def is_undecodable(text: str) -> bool:
    """Whether there were bytes in it that are no UTF-8."""
    return _ESCAPED_BYTE.search(text) is not None


def is_binary(text: str, *, whole_file: bool) -> bool:
    """Whether it is a program, a picture, or text in a 16-bit encoding without its mark.

    A file is when NUL is near its start (git's rule); a row when more than 1 in 100 are.
    """
    return "\x00" in text[:_BINARY_LOOK] if whole_file else text.count("\x00") > len(text) // 100


def as_text(value: Any) -> str | None:
    """A value that is text, or text in bytes; None for all others."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) else None


def printable(path: Path | str) -> str:
    r"""A path as text that can be written anywhere: `caf\xe9.txt` where a byte is no UTF-8."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def listed(names: Iterable[Any]) -> str:
    """Names of columns for an error: not all of thousands, nor a text that stands for one."""
    first = [plain(str(name))[:40] for name in islice(names, 21)]
    return ", ".join(first[:20]) + ", ..." * (len(first) > 20) or "none"


def read_text(path: Path) -> str:
    """The whole of a text file.

    Raises:
        BadInputError: it cannot be read, or is too long.
    """
    with _reading(path, "text"), _open(path) as file:
        return _bounded(file.read, path)


def read_parts(path: Path, separator: str) -> Iterator[str]:
    """The parts of a text file between lines that are `separator`, spaces at their end ignored.

    Raises:
        BadInputError: the file cannot be read, or a part is too long.
    """
    mark, part, length = separator.strip("\r\n").rstrip(), list[str](), 0
    with _reading(path, "text"), _open(path) as file:
        while line := _bounded(file.readline, path):
            if line.rstrip() == mark:
                yield "".join(part)
                part, length = [], 0
                continue
            part.append(line)
            length += len(line)
            if length > MAX_VALUE_CHARS:
                raise _too_long(path)
        yield "".join(part)


def read_rows(path: Path, only: Collection[str | None] | None = None) -> Iterator[Any]:
    """Rows of a JSONL, JSON, CSV or Parquet file: mappings, if the file is what it should be.

    Args:
        path: a file whose `kind_of` is not "text".
        only: of Parquet, columns to read (None: all). Those that are not there are left out.

    Raises:
        BadInputError: it cannot be read.
    """
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet_rows(path, only)
    elif kind == "csv":
        yield from _csv_rows(path)
    elif kind == "json":
        yield from _json_rows(path)
    else:
        with _reading(path, "JSON lines"), _open(path) as file:
            yield from _json_lines(file, path)


def parquet_columns(path: Path) -> dict[str, pa.DataType]:
    """Names and types of a Parquet file's columns.

    Raises:
        BadInputError: it is no Parquet.
    """
    import pyarrow.parquet as pq

    with _reading(path, "Parquet"):
        schema = pq.read_schema(path)
        return dict(zip(schema.names, schema.types, strict=True))


def holds_text(data_type: pa.DataType) -> bool:
    """Whether a Parquet column is text, or bytes that may be text."""
    import pyarrow as pa

    if pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    return bool(
        pa.types.is_string(data_type)
        or pa.types.is_large_string(data_type)
        or pa.types.is_string_view(data_type)
        or pa.types.is_binary(data_type)
        or pa.types.is_large_binary(data_type)
        or pa.types.is_binary_view(data_type)
        or pa.types.is_fixed_size_binary(data_type)
        or pa.types.is_null(data_type)
    )


def _inner_suffix(path: Path) -> str:
    """`.csv` of a.csv and of A.CSV.GZ."""
    packed = path.suffix.lower() in PACKED
    return (Path(path.stem) if packed else path).suffix.lower()


def _read_errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return OSError, EOFError, ValueError, RecursionError, zlib.error, pa.ArrowException


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes an error that names the file."""
    try:
        yield
    except _read_errors() as error:
        nested = isinstance(error, RecursionError)
        raise BadInputError(
            f"{printable(path)} cannot be read as {kind}.",
            "It is nested too deeply." if nested else f"{printable(str(error))}.",
            "Mend the file, or name it no longer.",
        ) from error


@contextmanager
def _open(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A file as text, unpacked; UTF-8, or what its byte order mark says."""
    suffix = path.suffix.lower()
    with path.open("rb") as packed:
        raw: Any = packed
        if suffix == ".gz":
            raw = gzip.GzipFile(fileobj=packed)
        elif suffix == ".bz2":
            raw = bz2.BZ2File(packed)
        elif suffix == ".zst":
            import pyarrow as pa

            raw = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd")
        buffered = io.BufferedReader(raw)
        encoding = _encoding(buffered.peek(4)[:4])
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        with io.TextIOWrapper(buffered, encoding, errors, newline) as text:
            yield text


def _encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"  # before UTF-16, whose mark it begins with
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig" if head.startswith(codecs.BOM_UTF8) else "utf-8"


def _bounded(read: Callable[[int], str], path: Path) -> str:
    text = read(MAX_VALUE_CHARS + 1)
    if len(text) > MAX_VALUE_CHARS:
        raise _too_long(path)
    return text


def _too_long(path: Path) -> BadInputError:
    return BadInputError(
        f"{printable(path)} holds a text of more than {MAX_VALUE_CHARS:,} characters.",
        "One document, line or JSON file must fit into memory; so much is hardly meant.",
        "Cut it into documents: JSON lines, or a text file with `document_separator`.",
    )


def _json_lines(file: IO[str], path: Path) -> Iterator[Any]:
    number = 0
    while line := _bounded(file.readline, path):
        number += 1
        if line.strip():
            try:
                yield parse_json(line, unique_keys=True)
            except ValueError as error:
                with _reading(path, f"JSON at line {number}"):
                    raise error


def _json_rows(path: Path) -> Iterator[Any]:
    """Rows of one JSON list, or of one object; or of lines, which many name .json too."""
    with _reading(path, "JSON"), _open(path) as file:
        text = _bounded(file.read, path)
        try:
            value = parse_json(text, unique_keys=True)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise
            yield from _json_lines(io.StringIO(text), path)
            return
    if not isinstance(value, list | dict):
        raise BadInputError(
            f"{printable(path)} holds {_json_name(value)}.",
            "Rows are JSON objects, in a list or one a line.",
            "Write it as a list of objects, or leave it out.",
        )
    yield from value if isinstance(value, list) else [value]


def _json_name(value: Any) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", str: "a string"}
    return "null" if value is None else names[type(value)]


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows under the names of the first line. Quotes must match, and every row have every field:
    what a stray quote or comma makes of a table is not what was meant."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_VALUE_CHARS))
    tabs = _inner_suffix(path) == ".tsv"
    with _reading(path, "CSV"), _open(path, newline="") as file:
        lines = iter(lambda: _bounded(file.readline, path), "")
        reader = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
        try:
            header = next(reader, [])
            _check_names(header)
            for row in filter(None, reader):
                if len(row) != len(header):
                    raise ValueError(
                        f"{len(row)} fields at line {reader.line_num}, but the first line names "
                        f"{len(header)}; a field with commas or line breaks needs quotes"
                    )
                yield dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ValueError(f"{error} at line {reader.line_num}") from error


def _check_names(names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two columns have the name '{listed(twice[:1])}'")


def _parquet_rows(path: Path, only: Collection[str | None] | None) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with _reading(path, "Parquet"), pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if only is None or name in only]
        _check_names(names)
        for batch in file.iter_batches(_ROWS_PER_READ, columns=names):
            columns = [_values(batch.column(name)) for name in names]
            for values in zip(*columns, strict=True):
                yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    """A column's values; text is decoded here, where one bad value spoils no other."""
    import pyarrow as pa

    if not holds_text(column.type) or pa.types.is_null(column.type):
        return column.to_pylist()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return [as_text(value) for value in column.cast(pa.large_binary()).to_pylist()]
