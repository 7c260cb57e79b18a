"""The per-user cache's place, hashes, and free disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rldecoder.errors import NoResourceError
from rldecoder.lm.user_cache import require_disk, sha256_file, user_cache


def test_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path / "mine"))
    assert user_cache() == tmp_path / "mine"
    monkeypatch.delenv("RLDECODER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "rldecoder"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path.home() / ".cache" / "rldecoder"


def test_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_too_little_disk(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet", 1, "A test")
    with pytest.raises(NoResourceError, match=r"A test needs 1000000000.0 GB .* are free"):
        require_disk(tmp_path / "not" / "yet", 10**18, "A test")
