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


def test_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"1" + b" " * 2000)
    assert read_json_file(path) == parse_json("1") == 1
    with pytest.raises(ValueError, match="larger"):
        read_json_file(path, max_bytes=1000)
