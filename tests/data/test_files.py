"""What a file holds is what is read, packed or in other encodings; or the file is refused."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rldecoder.data import files
from rldecoder.errors import BadInputError


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def rows(folder: Path, name: str, data: bytes) -> list[Any]:
    return list(files.read_rows(write(folder, name, data)))


PACKERS = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_are_read_to_their_end(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS[suffix]
    # Two members: tools append to packed files, and a reader that stops at the first loses half.
    text = write(tmp_path, f"a.txt{suffix}", pack("caf\u00e9\r\n".encode()) + pack(b"more"))
    assert files.read_text(text) == "caf\u00e9\nmore"
    assert rows(tmp_path, f"B.JSONL{suffix.upper()}", pack(b'{"text": "x"}\n')) == [{"text": "x"}]
    assert rows(tmp_path, f"c.csv{suffix}", pack(b"text\nx\n")) == [{"text": "x"}]
    with pytest.raises(BadInputError, match=r"d\.jsonl.* cannot be read"):
        rows(tmp_path, f"d.jsonl{suffix}", pack(b'{"text": "x"}\n' * 99)[:-9])
    assert files.kind_of(Path(f"e.parquet{suffix}")) is None


def test_a_packed_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_VALUE_CHARS", 1000)
    for name in ("a.jsonl.gz", "a.json.gz", "a.csv.gz"):
        with pytest.raises(BadInputError, match=r"more than 1,000 characters"):
            rows(tmp_path, name, gzip.compress(b"0" * 2000))
    path = write(tmp_path, "a.txt.gz", gzip.compress(b"00\n" * 999))
    with pytest.raises(BadInputError, match=r"more than 1,000 characters"):
        files.read_text(path)
    with pytest.raises(BadInputError, match=r"more than 1,000 characters"):
        list(files.read_parts(path, "---"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str) -> None:
    assert files.read_text(write(tmp_path, "a.TXT", "\u00e9\n".encode(encoding))) == "\u00e9\n"
    assert rows(tmp_path, "a.csv", "text\n\u00e9".encode(encoding)) == [{"text": "\u00e9"}]
    data = '{"text": "\u00e9"}\n{"text": "b"}'.encode(encoding)
    assert rows(tmp_path, "a.jsonl", data) == [{"text": "\u00e9"}, {"text": "b"}]


def test_bytes_that_are_no_utf8_spoil_their_own_value_only(tmp_path: Path) -> None:
    found = rows(tmp_path, "a.jsonl", b'{"text": "caf\xe9"}\n{"text": "b \\ud83d"}\n')
    assert [files.is_undecodable(row["text"]) for row in found] == [True, False]
    bad = pa.array([b"caf\xe9", b"fine", None], pa.binary())
    for kind in (pa.string(), pa.large_string()):
        base = bad.cast(pa.large_binary()) if kind == pa.large_string() else bad
        text = pa.Array.from_buffers(kind, 3, base.buffers())
        pq.write_table(pa.table({"text": text, "raw": bad}), tmp_path / "a.parquet")
        for row, wrong in zip(files.read_rows(tmp_path / "a.parquet"), (1, 0, None), strict=True):
            assert row["text"] == row["raw"]
            assert wrong is None or files.is_undecodable(row["text"]) == wrong


def test_columns_of_text_in_every_type(tmp_path: Path) -> None:
    plain = pa.array(["a", None])
    for kind in (
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ):  # fmt: skip
        pq.write_table(pa.table({"text": plain.cast(kind)}), tmp_path / "a.parquet")
        assert list(files.read_rows(tmp_path / "a.parquet")) == [{"text": "a"}, {"text": None}]
        assert files.holds_text(files.parquet_columns(tmp_path / "a.parquet")["text"])
    assert not files.holds_text(pa.list_(pa.string()))
    assert not files.holds_text(pa.int64())


def test_csv_with_quoted_line_breaks_and_tabs(tmp_path: Path) -> None:
    data = b'text,id\r\n"a\nb, ""c""",1\r\n\r\nd,2\r\n'
    assert [row["text"] for row in rows(tmp_path, "a.csv", data)] == ['a\nb, "c"', "d"]
    assert rows(tmp_path, "a.tsv", b"text\tid\na,b\t1\n") == [{"text": "a,b", "id": "1"}]
    long = b"x" * 200_000  # beyond the csv module's own limit
    assert rows(tmp_path, "a.csv", b"text\n" + long) == [{"text": long.decode()}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'text,id\n"a\nb,1\n', "unexpected end of data"),
        (b"text\nHello, world\n", "2 fields at line 2"),
        (b"text,id\nalone\n", "1 fields at line 2"),
        (b"text,text\na,b\n", "two columns have the name 'text'"),
    ],
)
def test_csv_that_would_be_read_wrongly(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        rows(tmp_path, "a.csv", data)


def test_the_shapes_of_json(tmp_path: Path) -> None:
    one = {"text": "x"}
    assert rows(tmp_path, "a.json", json.dumps([one, one]).encode()) == [one, one]
    assert rows(tmp_path, "a.json", json.dumps(one).encode()) == [one]
    # Many write JSON lines and call them .json.
    assert rows(tmp_path, "a.json", b'{"text": "x"}\n\n{"text": "x"}\n') == [one, one]
    assert rows(tmp_path, "a.ndjson", b'{"text": "x"}\n') == [one]
    for value, name in ((b"5", "a number"), (b'"x"', "a string"), (b"null", "null")):
        with pytest.raises(BadInputError, match=f"holds {name}"):
            rows(tmp_path, "a.json", value)
    with pytest.raises(BadInputError, match="JSON at line 2"):
        rows(tmp_path, "a.jsonl", b'{"text": "x"}\n[\n')


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, suffix: str) -> None:
    """Which of the two texts was meant, nobody knows."""
    with pytest.raises(BadInputError, match="'text' stands twice"):
        rows(tmp_path, f"a.{suffix}", b'{"text": "x", "text": "y"}\n')


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_deep_json_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(BadInputError, match="nested too deeply"):
        rows(tmp_path, f"a.{suffix}", b"[" * 100_000 + b"]" * 100_000)


def test_separators_stand_on_a_line_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"---\r\na --- b\r\n---\r\n---  \r\n----\r\nc\r\n---")
    parts = list(files.read_parts(path, "---"))
    assert [part.strip() for part in parts] == ["", "a --- b", "", "----\nc", ""]
    assert list(files.read_parts(path, "\n---\n")) == parts


def test_columns_in_errors_are_short() -> None:
    assert files.listed(["a", "b\x1b\n"]) == "a, b"
    assert files.listed(["x" * 99]) == "x" * 40
    assert files.listed(map(str, range(99))).endswith("18, 19, ...")
    assert files.listed([]) == "none"
