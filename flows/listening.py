"""Whether anybody still hears the answer to a review that was started from Python.

Such a review has no deployment, so nothing takes it up again when its process is killed; its form
would stay in the UI, take a verdict, and lose it. While it runs it holds a lock that the kernel
drops with the process. A file that nobody holds is that of a dead one: the server of `make ui`
refuses answers to it, and ends the run at its next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from rldecoder.lm.user_cache import user_cache


@contextlib.contextmanager
def listening(run_id: object) -> Iterator[None]:
    """Say that this process waits for the answers to a flow run, for the length of the block."""
    path = _path(run_id)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # nobody holds it for longer than a look takes
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def is_deaf(run_id: object) -> bool:
    """Whether the process that listened is gone. False where none of this machine ever did."""
    try:
        fd = os.open(_path(run_id), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ValueError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def forget(run_id: object) -> None:
    """After the run of a dead process was ended."""
    _path(run_id).unlink(missing_ok=True)


def _path(run_id: object) -> Path:
    # An id that a stranger sent names no other file.
    return user_cache() / "reviews" / str(uuid.UUID(str(run_id)))
