"""Where text comes from: Python's own documentation, local files, the `datasets` library.

Every source is an iterator of candidates in an order that depends on the seed only.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from rldecoder.config.data import (
    DatasetSource,
    LocalSource,
    PydocsSource,
    PysourceSource,
    ReaderSource,
    Source,
    TasksSource,
)
from rldecoder.data.documents import Candidate, Document, paragraphs, plain, unit_hash
from rldecoder.data.files import (
    as_text,
    holds_text,
    is_binary,
    is_undecodable,
    kind_of,
    listed,
    parquet_columns,
    printable,
    read_parts,
    read_rows,
    read_text,
)
from rldecoder.data.folders import FoundFile, list_files
from rldecoder.data.python_corpus import (
    pydocs_candidates,
    pysource_candidates,
    python_fingerprint,
)
from rldecoder.data.reader import reader_candidates, reader_fingerprint
from rldecoder.errors import BadInputError
from rldecoder.seeds import derive_seed

READER_VERSION = 2
"""Raised when the same files would give other documents, or other keys. It is part of the digest
of runs that read files or datasets, and of no others."""

TASK_PROMPTS_VERSION = 1
"""Raised when a `tasks` source would give other documents."""

MakeDocuments = Callable[[TasksSource], Iterable[Candidate]]

_LICENCES = ("licence", "license")
_TITLE_CHARS = 300


def candidates(
    sources: Sequence[Source],
    *,
    seed: int,
    shuffle_buffer: int,
    dropped: Counter[str] | None = None,
    made: MakeDocuments | None = None,
) -> Iterator[Candidate]:
    """Documents of several sources, one of each in turn until all are exhausted.

    Args:
        sources: at least one.
        seed: decides the order within each source.
        shuffle_buffer: rows of files and datasets are shuffled within this many documents.
        dropped: counts what was read and is no text, by reason.
        made: makes the documents of a `tasks` source, which this package knows nothing of.

    Raises:
        BadInputError: if a source is missing, unreadable, or lacks its text column.
    """
    dropped = Counter() if dropped is None else dropped
    taken: set[str] = set()
    streams = [
        _one_source(source, seed, shuffle_buffer, dropped, taken, made) for source in sources
    ]
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
        elif isinstance(source, ReaderSource):
            parts = reader_fingerprint()
        elif isinstance(source, TasksSource):
            parts = {"prompts": str(TASK_PROMPTS_VERSION)}
        elif isinstance(source, LocalSource):
            parts = _file_hashes(file.path for file in list_files(source.paths).files)
        else:
            parts = {"revision": source.revision or "unpinned"}
            files = sorted(path for path in Path(source.name).rglob("*") if path.is_file())
            parts |= _file_hashes(files)
        if isinstance(source, LocalSource | DatasetSource):
            parts["reader"] = str(READER_VERSION)
        found |= {f"{index}.{source.type}.{name}": value for name, value in parts.items()}
    return found


def left_out_files(sources: Sequence[Source]) -> Counter[str]:
    """Files in the folders of local sources that are not read, by kind."""
    found: Counter[str] = Counter()
    for source in sources:
        if isinstance(source, LocalSource):
            found += list_files(source.paths).left_out
    return found


def _one_source(
    source: Source,
    seed: int,
    shuffle_buffer: int,
    dropped: Counter[str],
    taken: set[str],
    made: MakeDocuments | None,
) -> Iterator[Candidate]:
    if isinstance(source, PydocsSource):
        found = pydocs_candidates(source.stdlib, source.packages)
        return iter(_sorted_by_hash(found, seed))
    if isinstance(source, PysourceSource):
        return iter(_sorted_by_hash(pysource_candidates(), seed))
    if isinstance(source, ReaderSource):
        return iter(_sorted_by_hash(reader_candidates(), seed))
    if isinstance(source, TasksSource):
        if made is None:
            raise ValueError("a `tasks` source needs `made`")
        return iter(_sorted_by_hash(made(source), seed))
    if isinstance(source, LocalSource):
        documents = _local_documents(source, dropped, list_files(source.paths, taken).files)
    else:
        documents = _dataset_documents(source, dropped)
    return _buffer_shuffled(documents, seed, shuffle_buffer)


def _sorted_by_hash(found: Iterable[Candidate], seed: int) -> list[Candidate]:
    return sorted(found, key=lambda item: unit_hash("order", seed, item.key))


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
    return Candidate(document.key, lambda: document, users=True)


def _local_documents(
    source: LocalSource, dropped: Counter[str], files: Sequence[FoundFile]
) -> Iterator[Document]:
    for file in files:
        kind = kind_of(file.path)
        if kind == "text":
            yield from _text_documents(file, source, dropped)
            continue
        wanted = {source.text_column, source.title_column, *_LICENCES}
        if kind == "parquet":
            _check_parquet(file.path, source)
        rows = read_rows(file.path, wanted)
        yield from _row_documents(rows, printable(file.path), file.name, source, dropped)


def _text_documents(
    file: FoundFile, source: LocalSource, dropped: Counter[str]
) -> Iterator[Document]:
    """The file, or its parts between separators; parts without text are none."""
    alone = source.document_separator is None
    if source.document_separator is None:
        parts = iter([read_text(file.path)])
    else:
        parts = read_parts(file.path, source.document_separator)
    if source.document_chars is not None:
        size = source.document_chars
        parts = (piece for part in parts for piece in paragraphs(part, size))
    for number, part in enumerate(parts):
        why = _why_no_text(part, whole_file=True)
        if why is None:
            title = f"{file.name} {number}"
            key = f"local:{file.name}:{number}"
            yield Document(key, title, file.name, source.licence, part)
        elif file.named and alone and why != "no_text":
            raise BadInputError(
                f"{printable(file.path)} cannot be read as UTF-8 text.",
                "It is a binary file." if why == "binary" else "It has bytes that are no UTF-8.",
                "Convert it to UTF-8 or remove it from `ingest.sources[].paths`.",
            )
        elif alone or why != "no_text":
            dropped[why] += 1


def _why_no_text(text: str, *, whole_file: bool = False) -> str | None:
    """The reason to drop a value, None when it is text."""
    if is_binary(text, whole_file=whole_file):
        return "binary"
    if is_undecodable(text):
        return "not_utf8"
    return None if text.strip() else "no_text"


def _dataset_documents(source: DatasetSource, dropped: Counter[str]) -> Iterator[Document]:
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
        yield from _row_documents(rows, f"dataset {source.name}", source.name, source, dropped)
    except BadInputError:
        raise
    except Exception as error:  # the library raises many kinds, from requests' to its own
        raise BadInputError(
            f"Dataset {source.name!r} cannot be read.",
            f"{type(error).__name__}: {error}.",
            "Check name, subset, split and revision, and that the hub can be reached.",
        ) from error


def _row_documents(
    rows: Iterable[Any],
    where: str,
    name: str,
    source: LocalSource | DatasetSource,
    dropped: Counter[str],
) -> Iterator[Document]:
    """One document a row; rows whose text is null, empty or no text are counted."""
    for number, row in zip(count(), rows, strict=False):
        if not isinstance(row, Mapping):
            raise _no_column(f"{where} has, in row {number},", source, None)
        if source.text_column not in row:
            columns = {str(column): isinstance(row[column], str | bytes) for column in row}
            raise _no_column(f"{where} has, in row {number},", source, columns)
        value = row[source.text_column]
        text = as_text(value)
        if text is None:
            dropped["no_text" if value is None else "not_text"] += 1
            continue
        why = _why_no_text(text)
        if why is not None:
            dropped[why] += 1
            continue
        title = _label(row.get(source.title_column)) if source.title_column else ""
        licence = next(filter(None, (_label(row.get(name)) for name in _LICENCES)), "")
        key = f"{source.type}:{name}:{number}"
        yield Document(key, title or f"{name} {number}", name, licence or source.licence, text)


def _check_parquet(path: Path, source: LocalSource) -> None:
    """Refuse a file without the text column, or with something else than text in it."""
    import pyarrow as pa

    columns = parquet_columns(path)
    where = f"{printable(path)} has"
    if source.text_column not in columns:
        texts = {
            name: holds_text(data_type) and not pa.types.is_null(data_type)
            for name, data_type in columns.items()
        }
        raise _no_column(where, source, texts)
    if not holds_text(columns[source.text_column]):
        raise BadInputError(
            f"{where} no text in its column `{source.text_column}`.",
            f"The column's type is {columns[source.text_column]}.",
            "Set `ingest.sources[].text_column` to a column of strings, or convert it.",
        )


def _no_column(
    where: str, source: LocalSource | DatasetSource, columns: Mapping[str, bool] | None
) -> BadInputError:
    """`columns`: whether each is text; None when the row is no object."""
    names = listed(columns) if columns is not None else "none: it is no object"
    texts = [name for name, is_text in (columns or {}).items() if is_text]
    hint = f" Only `{listed(texts)}` holds text." if len(texts) == 1 else ""
    return BadInputError(
        f"{where} no column `{source.text_column}`.",
        f"Its columns: {names}.{hint}",
        "Set `ingest.sources[].text_column` to the column with the text.",
    )


def _label(value: Any) -> str:
    """A title or licence from a row, on one line; "" where there is none."""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_label, value)))
    text = as_text(value)
    if text is None:
        text = "" if not value else str(value)
    return plain(text)[:_TITLE_CHARS]


def _file_hashes(paths: Iterable[Path]) -> dict[str, str]:
    found = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                found[printable(path)] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadInputError(
                f"{printable(path)} cannot be read.",
                f"{printable(str(error))}.",
                "Make it readable, or remove it from `ingest.sources`.",
            ) from error
    return found
