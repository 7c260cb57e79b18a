"""Local files and datasets as documents; clear errors for what cannot be read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rldecoder.config.data import DatasetSource, LocalSource, PydocsSource, PysourceSource, Source
from rldecoder.data.documents import Document
from rldecoder.data.folders import list_files
from rldecoder.data.sources import candidates, fingerprint, left_out_files
from rldecoder.errors import BadInputError

ROWS = [
    {"text": "first text", "name": "A", "license": "MIT"},
    {"text": "", "name": "empty", "license": "MIT"},
    {"text": "second text", "name": "B", "license": None},
]


def read(*sources: Source, seed: int = 0, buffer: int = 100) -> list[Document]:
    found = [c.load() for c in candidates(sources, seed=seed, shuffle_buffer=buffer)]
    return [document for document in found if document is not None]


def read_counting(source: Source) -> tuple[list[str], Counter[str]]:
    dropped: Counter[str] = Counter()
    found = candidates([source], seed=0, shuffle_buffer=100, dropped=dropped)
    documents = [candidate.load() for candidate in found]
    return sorted(document.text for document in documents if document is not None), dropped


def local(path: Path, **settings: object) -> LocalSource:
    return LocalSource.model_validate({"paths": [str(path)], **settings})


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_become_documents(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path, suffix)
    documents = sorted(read(local(path, title_column="name", licence="CC0-1.0")))
    assert [(d.title, d.licence, d.text) for d in documents] == [
        ("A", "MIT", "first text"),
        ("B", "CC0-1.0", "second text"),
    ]
    assert {d.key for d in documents} == {f"local:rows{suffix}:0", f"local:rows{suffix}:2"}


def test_text_files_and_separator(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n")
    (tmp_path / "inner" / "b.md").write_text("three")
    (tmp_path / "c.bin").write_bytes(b"\x00")
    assert sorted(d.text for d in read(local(tmp_path))) == ["one\n---\ntwo\n", "three"]
    split = read(local(tmp_path, document_separator="---"))
    assert sorted(d.text.strip() for d in split) == ["one", "three", "two"]
    assert len({d.key for d in split}) == 3


def test_order_is_shuffled_by_seed_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(50)))
    for buffer in (1, 7, 100):
        first = [d.key for d in read(local(path), seed=1, buffer=buffer)]
        assert first == [d.key for d in read(local(path), seed=1, buffer=buffer)]
        assert len(set(first)) == 50
        if buffer > 1:
            assert first != [d.key for d in read(local(path), seed=2, buffer=buffer)]


def test_sources_are_interleaved(tmp_path: Path) -> None:
    for name, count in (("a", 1), ("b", 3)):
        lines = [json.dumps({"text": f"{name} {i}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    got = [d.text[0] for d in read(local(tmp_path / "a.jsonl"), local(tmp_path / "b.jsonl"))]
    assert got == ["a", "b", "b", "b"]


def test_pydocs_order_depends_on_the_seed() -> None:
    def keys(seed: int) -> list[str]:
        source = PydocsSource(packages=())
        return [c.key for c in candidates([source], seed=seed, shuffle_buffer=1)]

    assert keys(0) == keys(0)
    assert keys(0) != keys(1)
    assert sorted(keys(0)) == sorted(keys(1))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt"])
def test_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(b'{"text": \xff')
    with pytest.raises(BadInputError, match=f"bad\\{suffix} cannot be read"):
        read(local(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_text_column_lists_the_columns(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path, suffix)
    with pytest.raises(BadInputError, match="no column `body`"):
        read(local(path, text_column="body"))


def test_json_rows_that_are_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text('["a", "b"]')
    with pytest.raises(BadInputError, match="it is no object"):
        read(local(path))


def test_missing_path_and_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        list_files([str(tmp_path / "nowhere")])
    with pytest.raises(BadInputError, match="No text found"):
        list_files([str(tmp_path)])


@pytest.mark.parametrize("streaming", [True, False])
def test_dataset_from_a_local_folder(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data, ".parquet")
    documents = read(DatasetSource(name=str(data), streaming=streaming, licence="CC0-1.0"))
    assert sorted((d.text, d.licence) for d in documents) == [
        ("first text", "MIT"),
        ("second text", "CC0-1.0"),
    ]


def test_dataset_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be read"):
        read(DatasetSource(name=str(tmp_path / "nothing")))


def test_fingerprint_follows_file_content(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".jsonl")
    sources = [local(path), PysourceSource(), DatasetSource(name="x", revision="abc")]
    before = fingerprint(sources)
    assert before == fingerprint(sources)
    assert "abc" in before.values()
    path.write_text(path.read_text() + "\n")
    changed = {k for k, v in fingerprint(sources).items() if v != before[k]}
    assert changed == {f"0.local.{path}"}
    assert f"0.dataset.{path}" in fingerprint([DatasetSource(name=str(tmp_path))])


def test_bytes_are_decoded_and_what_is_no_text_is_counted(tmp_path: Path) -> None:
    values = ["one", b"two", b"caf\xe9", None, " ", ["three"], 4, {"a": "five"}]
    lines = [json.dumps({"text": v}) for v in values if not isinstance(v, bytes)]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n')
    texts, dropped = read_counting(local(tmp_path / "a.jsonl"))
    assert (texts, dropped) == (["one"], {"no_text": 2, "not_text": 3, "not_utf8": 1})
    raw = [v for v in values if isinstance(v, bytes)] + ["no mark".encode("utf-16-le")]
    pq.write_table(pa.table({"text": raw}), tmp_path / "b.parquet")
    texts, dropped = read_counting(local(tmp_path / "b.parquet"))
    assert (texts, dropped) == (["two"], {"not_utf8": 1, "binary": 1})


@pytest.mark.parametrize("values", [[["a"]], [1], [{"x": "a"}], [True]])
def test_a_parquet_column_that_is_no_text_is_refused(tmp_path: Path, values: list[object]) -> None:
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(BadInputError, match=r"no text in its column `text`.*type is"):
        read(local(tmp_path / "a.parquet"))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_the_only_column_with_text_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"content": ["a"], "id": [1]}), path)
    else:
        path.write_text('{"content": "a", "id": 1}\n' if suffix == "jsonl" else "content\na\n")
    with pytest.raises(BadInputError, match=r"Its columns: content.*Only `content` holds text"):
        read(local(path))


def test_text_files_in_a_folder_that_are_no_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(bytes(100) + b"ELF")
    (tmp_path / "d.txt").write_text("")
    texts, dropped = read_counting(local(tmp_path))
    assert (texts, dropped) == (["fine"], {"not_utf8": 1, "binary": 1, "no_text": 1})
    with pytest.raises(BadInputError, match="It is a binary file"):
        read(local(tmp_path / "c.txt"))
    # Between separators, one part among many is dropped.
    (tmp_path / "b.txt").write_bytes(b"caf\xe9\n---\n---\nfine")
    texts, dropped = read_counting(local(tmp_path / "b.txt", document_separator="---"))
    assert (texts, dropped) == (["fine"], {"not_utf8": 1})


def test_files_of_one_name_have_keys_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.md").write_text(f"text of {name}")
    whole = read(local(tmp_path))
    assert {d.key for d in whole} == {"local:a/index.md:0", "local:b/index.md:0"}
    assert {d.source for d in whole} == {"a/index.md", "b/index.md"}
    apart = read(local(tmp_path / "a"), local(tmp_path / "b"))
    assert len({d.key for d in apart}) == 2


def test_titles_and_licences_can_be_stored_and_shown(tmp_path: Path) -> None:
    row = {"text": "x", "title": "cut \ud83d\x1b[2J\nline", "license": ["MIT", "\ud83d"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (document,) = read(local(tmp_path / "a.jsonl", title_column="title"))
    assert (document.title, document.licence) == ("cut [2J line", "MIT")


def test_left_out_files_of_all_sources(tmp_path: Path) -> None:
    for name in ("a.txt", "b.pdf", ".c.txt"):
        (tmp_path / name).write_text("x")
    sources = [local(tmp_path), PysourceSource(), local(tmp_path)]
    assert left_out_files(sources) == {".pdf": 2, "hidden": 2}


def test_a_separator_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one line"):
        local(tmp_path, document_separator="a\nb")
