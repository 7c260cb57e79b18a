"""JSON that cannot be read ends in one kind of error."""

from __future__ import annotations

from pathlib import Path

import pytest

from rldecoder.json_text import parse_json, read_json_file


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 100_000, b"{", b"\xff\xfe", b"", b"9" * 10_000]
)
def test_every_fault_is_a_value_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ValueError):
        read_json_file(path)


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    text = '[{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}]'
    assert parse_json(text) == [{"a": 1, "b": {"c": 3, "d": 2}}]
    with pytest.raises(ValueError, match="the key 'c' stands twice"):
        parse_json(text, unique_keys=True)
    assert parse_json('{"a": {"a": 1}}', unique_keys=True) == {"a": {"a": 1}}


def test_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"1" + b" " * 2000)
    assert read_json_file(path) == parse_json("1") == 1
    with pytest.raises(ValueError, match="larger"):
        read_json_file(path, max_bytes=1000)
