"""The password file: private, made once, and nobody else's."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.password import authorization, password_of
from rldecoder.errors import BadInputError


def test_it_is_made_once_and_private(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: password_of(home), range(16)))
    assert len(made) == 1
    assert len(made.pop()) >= 32
    assert password_of(home) != password_of(tmp_path / "other")
    (only,) = home.iterdir()  # nothing is left of the writing
    assert only.stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700


def test_it_is_sent_as_prefect_does() -> None:
    assert base64.b64decode(authorization("a:b").removeprefix("Basic ")) == b"a:b"


@pytest.mark.parametrize("what", ["link", "readable", "empty", "binary", "folder"])
def test_a_file_that_others_made_or_read_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "ui-password"
    if what == "link":
        (tmp_path / "theirs").write_text("known")
        path.symlink_to(tmp_path / "theirs")
    elif what == "folder":
        path.mkdir()
    else:
        path.write_bytes({"readable": b"x", "empty": b"", "binary": b"\xff\0"}[what])
        path.chmod(0o644 if what == "readable" else 0o600)
    with pytest.raises(BadInputError, match="Delete it"):
        password_of(tmp_path)
