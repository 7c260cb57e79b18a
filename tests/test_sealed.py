"""Sealed files: every flipped bit is noticed, and so is another owner."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rldecoder import sealed
from rldecoder.errors import DamagedFileError


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    value = {"6/8/4": {"fvu": 0.25, "name": "ü"}}
    sealed.write(path, value, owner="sweep_sae/1")
    assert sealed.read(path, owner="sweep_sae/1") == value
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            sealed.read(path, owner="sweep_sae/1")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}\n", b"\xff\xfe", b"[" * 100_000, b'{"6/8/4": {"fvu": 1}}\n']
)
def test_torn_and_unsealed_files_only_cost_time(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cells.json"
    path.write_bytes(content)
    notes: list[str] = []
    assert sealed.read_or(path, {}, note=notes.append) == {}
    assert len(notes) == 1
    assert str(path) in notes[0]


def test_anothers_file_is_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    sealed.write(path, [1], owner="frontier/1")
    notes: list[str] = []
    assert sealed.read_or(path, [], owner="frontier/2", note=notes.append) == []
    assert "belongs to 'frontier/1'" in notes[0]
    assert sealed.read_or(tmp_path / "none.json", [], note=notes.append) == []
    assert len(notes) == 1  # nothing is said where there is nothing


def test_files_with_a_seal_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.parquet"
    notes: list[str] = []
    assert not sealed.is_intact(path, note=notes.append)
    assert notes == []
    rng = random.Random(1)
    data = rng.randbytes(300)
    path.write_bytes(data)
    assert not sealed.is_intact(path, owner="a", note=notes.append)  # no seal yet: torn
    sealed.seal_file(path, owner="a")
    assert sealed.is_intact(path, owner="a", note=notes.append)
    assert not sealed.is_intact(path, owner="b", note=notes.append)
    for place in range(0, 300, 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert not sealed.is_intact(path, owner="a", note=notes.append)
