"""Files that a user names: nothing waits, never ends, or is taken for text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rldecoder import user_files
from rldecoder.errors import BadInputError
from rldecoder.user_files import read_text


def test_text_is_read_with_and_without_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for data in (b"a\r\n\xc3\xa4", b"\xef\xbb\xbfa\n\xc3\xa4"):
        path.write_bytes(data)
        assert read_text(path, "") == "a\nä"


def test_all_else_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    (tmp_path / "large").write_bytes(b"x" * 101)
    monkeypatch.setattr(user_files, "MAX_BYTES", 100)
    names = ("absent", "pipe", "latin1", "large", "", "/dev/zero", "nul\0", "n" * 300)
    for name in names:
        with pytest.raises(BadInputError, match="cannot be read") as caught:
            read_text(tmp_path / name, "Name a file.")
        assert caught.value.mend == "Name a file."
