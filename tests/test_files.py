"""Files are whole or absent, whatever happens while they are written; errors that name the disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rldecoder import files
from rldecoder.errors import BadInputError, DamagedFileError, NoResourceError


def test_kill_9_in_the_middle_of_rewriting_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    files.write_bytes(path, b"old")
    code = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from rldecoder import files
        def half(self, data):
            with open(self, "wb") as file:
                file.write(data[:3])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        Path.write_bytes = half
        files.write_bytes(Path({str(path)!r}), b"new content")
    """)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    files.write_bytes(path, b"new content")
    assert path.read_bytes() == b"new content"


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_bytes(path, b"old")
    with pytest.raises(OSError, match="No space"), files.aside(path) as draft:
        draft.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    assert files.read_regular(tmp_path / "file") == b"x"
    for name in ("link", "pipe", "none", "."):
        with pytest.raises(OSError, match="Errno"):
            files.read_regular(tmp_path / name)
    with pytest.raises(OSError, match="not a regular file"):
        files.hash_file(Path("/dev/zero"))


def test_what_nobody_may_read_is_no_damage() -> None:
    def kind(number: int) -> type[Exception]:
        return type(files.unreadable(Path("x"), OSError(number, "why"), "mend"))

    assert [kind(n) for n in (errno.ENOENT, errno.ELOOP)] == [DamagedFileError] * 2
    assert [kind(n) for n in (errno.EACCES, errno.EMFILE)] == [NoResourceError] * 2


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
        (OSError(errno.EDQUOT, "Quota"), "is full"),
        (ValueError("I/O error: No space left on device (os error 28)"), "is full"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), "is full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written to"),
        (RuntimeError("attempt to write a readonly database"), "cannot be written to"),
        (PermissionError(errno.EACCES, "Permission denied", "/store/x"), "cannot be written to"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/store/x"), "in the way"),
    ],
)
def test_trouble_with_the_disk_is_one_clear_error(error: Exception, says: str) -> None:
    with pytest.raises(NoResourceError, match=says) as found, files.explained("/store", "testing"):
        raise error
    assert found.value.exit_code == 2


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "/store/x"),
        PermissionError(errno.EACCES, "Permission denied", "/home/text.txt"),
        ConnectionError("refused"),
        BadInputError("The prompt says: no space left on device."),
        ValueError("shapes differ"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as found, files.explained("/store", "testing"):
        raise error
    assert found.value is error


def test_a_full_disk_is_found_behind_another_error() -> None:
    with pytest.raises(NoResourceError, match="is full"), files.explained("/store", "testing"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise DamagedFileError("It cannot be opened.") from error
