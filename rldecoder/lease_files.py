"""Lock files of leases: one a device, in a folder of this user that nobody else can write to.

The folder lies under the temporary folder, where every user of the machine may put things: a link
under our name would make us truncate and overwrite what it points to. So the folder is opened
once, what was opened is looked at, and its files are opened in it and never through a link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rldecoder.errors import BadInputError

LEASE_FOLDER = "RLDECODER_LEASES"
"""Where the lock files lie; by default a folder of this user under the temporary folder."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MOST_READ = 1000
_INNERMOST = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not make us wait


def default_lease_folder() -> Path:
    """The folder of this user's lock files (not created here)."""
    named = os.environ.get(LEASE_FOLDER)
    return Path(named) if named else _own_folder()


def _own_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"rldecoder-leases-{os.getuid()}"


def make_folder(folder: Path) -> None:
    """Make the folder, 0700, where it is missing.

    Raises:
        BadInputError: it cannot be made, or is not ours alone.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # looked at below, whoever made it
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise _refused(folder, f"{error.strerror or error}.") from error
    with _opened(folder):
        pass


def lock_name(uuid: str) -> str:
    """Name of a device's lock file."""
    return f"{''.join(c if c.isalnum() or c == '-' else '_' for c in uuid)}.lock"


def try_lock(folder: Path, uuid: str, task: str) -> int | None:
    """Lock a device's file and write who holds it; None when someone else has it.

    Raises:
        BadInputError: the folder or the file is not ours alone.
    """
    with _opened(folder) as directory:
        fd = _open(directory, folder, lock_name(uuid), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "task": task}).encode(), 0)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def holder(folder: Path, uuid: str) -> str:
    """Who holds a device's lock, in words; empty when nobody does.

    Raises:
        BadInputError: the folder or the file is not ours alone.
    """
    try:
        with _opened(folder) as directory:
            fd = _open(directory, folder, lock_name(uuid), os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        # A shared probe: two probes do not disturb each other, a holder refuses both.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        text = os.pread(fd, _MOST_READ, 0).decode(errors="replace")
    finally:
        os.close(fd)
    try:
        who = json.loads(text)
        return f"{who['task'] or 'a task'} (process {who['pid']})"
    except (ValueError, KeyError, TypeError, RecursionError):  # read between its lock and its line
        return "held"


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The folder itself, checked: what is opened in it cannot be exchanged for another any more.

    Raises:
        FileNotFoundError: there is none yet.
        BadInputError: it is a link or no folder, another user's, or others may write to it.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _INNERMOST)
    except FileNotFoundError:
        raise
    except OSError as error:
        link = folder.is_symlink()
        raise _refused(folder, "It is a link." if link else f"{error.strerror}.") from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise _refused(folder, f"It belongs to user {found.st_uid}.")
        # One that the user chose may be read by others; ours was made 0700.
        if found.st_mode & (_OTHERS if folder == _own_folder() else _OTHERS_WRITE):
            mode = stat.S_IMODE(found.st_mode)
            raise _refused(folder, f"Other users may use it (mode {mode:04o}).")
        yield fd
    finally:
        os.close(fd)


def _open(directory: int, folder: Path, name: str, flags: int) -> int:
    """A file of ours in the folder.

    Raises:
        FileNotFoundError: there is none, and `flags` make none.
        BadInputError: it is a link, no regular file, another user's, or has a second name.
    """
    try:
        fd = os.open(name, flags | _INNERMOST, 0o600, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        link = error.errno == errno.ELOOP
        why = "It is a link." if link else f"{error.strerror}."
        raise _refused(folder / name, why) from error
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1:
        return fd
    os.close(fd)
    raise _refused(folder / name, "It is no regular file of yours with one name.")


def _refused(path: Path, why: str) -> BadInputError:
    return BadInputError(
        f"Device leases cannot be kept in {path}.",
        why,
        f"Remove it (`chmod 700` it, if it is a folder of yours), or set {LEASE_FOLDER} to a "
        "folder that only you can write to.",
    )
