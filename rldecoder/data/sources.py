"""Where text comes from: Python's own documentation, local files, the `datasets` library.

Every source is an iterator of candidates in an order that depends on the seed only.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rldecoder.config.data import (
    DatasetSource,
    LocalSource,
    PydocsSource,
    PysourceSource,
    Source,
)
from rldecoder.data.documents import Candidate, Document, unit_hash
from rldecoder.data.python_corpus import (
    pydocs_candidates,
    pysource_candidates,
    python_fingerprint,
)
from rldecoder.errors import BadInputError
from rldecoder.seeds import derive_seed

_TEXT_SUFFIXES = {".txt", ".md", ".rst"}
_ROW_SUFFIXES = {".jsonl", ".json", ".parquet"}
_ROWS_PER_READ = 256


def candidates(sources: Sequence[Source], *, seed: int, shuffle_buffer: int) -> Iterator[Candidate]:
    """Documents of several sources, one of each in turn until all are exhausted.

    Args:
        sources: at least one.
        seed: decides the order within each source.
        shuffle_buffer: rows of files and datasets are shuffled within this many documents.

    Raises:
        BadInputError: if a source is missing, unreadable, or lacks its text column.
    """
    streams = [_one_source(source, seed, shuffle_buffer) for source in sources]
    while streams:
        for stream in list(streams):
            candidate = next(stream, None)
            if candidate is None:
                streams.remove(stream)
            else:
                yield candidate


def fingerprint(sources: Sequence[Source]) -> dict[str, str]:
    """What the sources' text depends on, for the digest: versions, or hashes of local files.

    Raises:
        BadInputError: if a file or package is missing.
    """
    found: dict[str, str] = {}
    for index, source in enumerate(sources):
        if isinstance(source, PydocsSource):
            parts = python_fingerprint(source.stdlib, source.packages)
        elif isinstance(source, PysourceSource):
            parts = python_fingerprint(True, ())
        elif isinstance(source, LocalSource):
            parts = {str(path): _file_hash(path) for path in local_files(source)}
        else:
            parts = {"revision": source.revision or "unpinned"}
            files = sorted(path for path in Path(source.name).rglob("*") if path.is_file())
            parts |= {str(path): _file_hash(path) for path in files}
        found |= {f"{index}.{source.type}.{name}": value for name, value in parts.items()}
    return found


def local_files(source: LocalSource) -> list[Path]:
    """Files of a local source, folders searched, in sorted order.

    Raises:
        BadInputError: if a path does not exist, or no file of a known kind is found.
    """
    known = _TEXT_SUFFIXES | _ROW_SUFFIXES
    files: list[Path] = []
    for text in source.paths:
        path = Path(text).expanduser()
        if not path.exists():
            raise BadInputError(
                f"{path} does not exist.",
                "It is named in `ingest.sources[].paths`.",
                "Correct the path; relative paths start at the working directory.",
            )
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [item for item in inside if item.is_file() and item.suffix.lower() in known]
    if not files:
        raise BadInputError(
            f"No text found at {', '.join(source.paths)}.",
            f"Files of these kinds are read: {', '.join(sorted(known))}.",
            "Name such a file, or a folder that holds some.",
        )
    return files


def _one_source(source: Source, seed: int, shuffle_buffer: int) -> Iterator[Candidate]:
    if isinstance(source, PydocsSource):
        listed = pydocs_candidates(source.stdlib, source.packages)
        return iter(_sorted_by_hash(listed, seed))
    if isinstance(source, PysourceSource):
        return iter(_sorted_by_hash(pysource_candidates(), seed))
    if isinstance(source, LocalSource):
        documents = _local_documents(source)
    else:
        documents = _dataset_documents(source)
    return _buffer_shuffled(documents, seed, shuffle_buffer)


def _sorted_by_hash(listed: Iterable[Candidate], seed: int) -> list[Candidate]:
    return sorted(listed, key=lambda item: unit_hash("order", seed, item.key))


def _buffer_shuffled(
    documents: Iterator[Document], seed: int, buffer_size: int
) -> Iterator[Candidate]:
    """Candidates in an order that is random within a sliding buffer."""
    generator = random.Random(derive_seed(seed, "buffer"))
    buffer: list[Document] = []
    for document in documents:
        buffer.append(document)
        if len(buffer) >= buffer_size:
            yield _candidate(buffer.pop(generator.randrange(len(buffer))))
    generator.shuffle(buffer)
    yield from map(_candidate, buffer)


def _candidate(document: Document) -> Candidate:
    return Candidate(document.key, lambda: document)


def _local_documents(source: LocalSource) -> Iterator[Document]:
    for path in local_files(source):
        if path.suffix.lower() in _TEXT_SUFFIXES:
            yield from _text_documents(path, source)
        else:
            rows = _parquet_rows(path, source) if path.suffix == ".parquet" else _json_rows(path)
            yield from _row_documents(rows, str(path), path.name, source)


def _text_documents(path: Path, source: LocalSource) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(
            f"{path} cannot be read as UTF-8 text.",
            f"{error}.",
            "Convert it to UTF-8 or remove it from `ingest.sources[].paths`.",
        ) from error
    parts = [text]
    if source.document_separator is not None:
        parts = f"\n{text}\n".split(f"\n{source.document_separator}\n")
    for number, part in enumerate(parts):
        key = f"local:{path.name}:{number}"
        yield Document(key, f"{path.name} {number}", path.name, source.licence, part)


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of JSON lines, or of one JSON list."""
    line_number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".json":
                yield from json.load(file)
                return
            for line in file:
                line_number += 1
                if line.strip():
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        where = f"JSON at line {line_number}" if line_number else "JSON"
        raise _unreadable(path, where, error) from error


def _parquet_rows(path: Path, source: LocalSource) -> Iterator[Mapping[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        wanted = {source.text_column, source.title_column, "licence", "license"}
        columns = [name for name in file.schema_arrow.names if name in wanted]
        for batch in file.iter_batches(_ROWS_PER_READ, columns=columns):
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, "Parquet", error) from error


def _dataset_documents(source: DatasetSource) -> Iterator[Document]:
    # Imported here: the library takes seconds to import, and most runs read no dataset.
    from datasets import load_dataset

    try:
        rows = load_dataset(
            source.name,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        yield from _row_documents(rows, f"dataset {source.name}", source.name, source)
    except BadInputError:
        raise
    except Exception as error:  # the library raises many kinds, from requests' to its own
        raise BadInputError(
            f"Dataset {source.name!r} cannot be read.",
            f"{type(error).__name__}: {error}.",
            "Check name, subset, split and revision, and that the hub can be reached.",
        ) from error


def _row_documents(
    rows: Iterable[Mapping[str, Any]],
    where: str,
    name: str,
    source: LocalSource | DatasetSource,
) -> Iterator[Document]:
    """One document a row; rows whose text is null or empty are left out."""
    for number, row in zip(count(), rows, strict=False):
        if not isinstance(row, Mapping) or source.text_column not in row:
            columns = ", ".join(row) if isinstance(row, Mapping) else "none: it is no object"
            raise BadInputError(
                f"{where} has no column `{source.text_column}` in row {number}.",
                f"Its columns: {columns}.",
                "Set `ingest.sources[].text_column` to the column with the text.",
            )
        text = row[source.text_column]
        title = row.get(source.title_column) if source.title_column else None
        licence = row.get("licence") or row.get("license") or source.licence
        if isinstance(text, str) and text:
            key = f"{source.type}:{name}:{number}"
            yield Document(key, str(title or f"{name} {number}"), name, str(licence), text)


def _unreadable(path: Path, kind: str, error: Exception) -> BadInputError:
    return BadInputError(
        f"{path} cannot be read as {kind}.",
        f"{error}.",
        "Mend the file or remove it from `ingest.sources[].paths`.",
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
