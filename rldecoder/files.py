"""Files that are whole or absent: written aside and renamed, opened only if regular, hashed.

Everything that a later process trusts is written through `aside`, so that a kill or a full disk
at any moment leaves the old content or the new one, never half of either.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rldecoder.errors import DamagedFileError, NoResourceError, RlDecoderError

_SPACE = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_IN_THE_WAY = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENOTEMPTY)
_DAMAGE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EIO,
    errno.ENAMETOOLONG,
)  # fmt: skip
# What libraries that raise errors of their own say of a full disk and of a read-only one.
_SPACE_WORDS = ("no space left on device", "disk is full", "disk quota exceeded")
_REFUSED_WORDS = ("read-only file system", "readonly database")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write the new content of `path`; it takes the place by rename, flushed to disk.

    When the body fails the old content stays and what was written is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    remove(draft)  # of a killed process of the same number
    try:
        yield draft
        fsync(draft)
        draft.replace(path)
    except BaseException:
        remove(draft)
        raise
    fsync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of a file, or make it: whole, and flushed to disk."""
    with aside(path) as draft:
        draft.write_bytes(data)


def open_regular(path: Path) -> int:
    """A descriptor for reading; the caller closes it.

    Raises:
        OSError: it is no regular file (a link, a pipe, a device, ...), or cannot be opened.
            Nothing else is ever waited for or read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; raises OSError as `open_regular` does."""
    with open(open_regular(path), "rb") as file:
        return file.read()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a regular file's bytes; raises OSError as `open_regular` does."""
    with open(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unreadable(path: Path, error: OSError, mend: str) -> RlDecoderError:
    """The error for a file that `open_regular` refused or could not read.

    Args:
        mend: what to do about a damaged file.
    """
    if error.errno in _DAMAGE:
        return DamagedFileError(f"{path} is missing or no plain file.", f"{error}.", mend)
    # Too many open files, say, or another user's: nothing that building it again would mend.
    return NoResourceError(f"{path} cannot be read.", f"{error}.", "Make it readable.")


def fsync(path: Path) -> None:
    """Force a file's content, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove whatever is there: a folder with all in it, a file, a link (not what it names)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def move_aside(path: Path) -> Path:
    """Rename what is in the way, or cannot be trusted; nothing is deleted."""
    target = move_aside_name(path)
    path.rename(target)
    return target


def move_aside_name(path: Path, why: str = "damaged") -> Path:
    """A name beside `path` that nothing has yet."""
    return path.with_name(f"{path.name}.{why}-{time.time_ns()}")


def clear_for_folder(path: Path, note: Callable[[str], None]) -> None:
    """Move aside what stands where a folder belongs and is none (a link to one may stay)."""
    if os.path.lexists(path) and not path.is_dir():
        note(f"{path} is not a folder; it was moved to {move_aside(path)}.")


@contextmanager
def explained(place: Path | str, what: str) -> Iterator[None]:
    """Turn a full disk, a read-only one or a file in the way into one clear error.

    Args:
        place: whose disk it is, as the user named it.
        what: what was being done ("building ingest/0123456789abcdef").

    Raises:
        NoResourceError: the body met one of these, in whatever form.
    """
    try:
        yield
    except NoResourceError:
        raise
    except Exception as error:  # libraries wrap a full disk in kinds of their own
        explanation = _explain(error, place, what)
        if explanation is None:
            raise
        raise explanation from error


def _explain(error: Exception, place: Path | str, what: str) -> NoResourceError | None:
    seen: BaseException | None = error
    ours = isinstance(error, RlDecoderError)  # says more than we could, but for a full disk
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        # A text only tells where the error has no number: a prompt may speak of full disks too.
        text = "" if number is not None or isinstance(seen, RlDecoderError) else str(seen).lower()
        if number in _SPACE or any(words in text for words in _SPACE_WORDS):
            return NoResourceError(
                f"The disk of {place} is full while {what}.",
                f"Nothing published was touched, and checkpoints are kept ({_short(seen)}).",
                "Free some space, or choose another --store, and run again: it goes on from there.",
            )
        if number == errno.EROFS or any(words in text for words in _REFUSED_WORDS):
            return _refused(place, what, seen)
        if number in _REFUSED and not ours and _inside(seen, place):
            return _refused(place, what, seen)
        if number in _IN_THE_WAY and not ours and _inside(seen, place):
            return NoResourceError(
                f"Something is in the way in {place} while {what}.",
                _short(seen),
                "Move it away and run again.",
            )
        seen = seen.__cause__
    return None


def _refused(place: Path | str, what: str, error: BaseException) -> NoResourceError:
    return NoResourceError(
        f"{place} cannot be written to while {what}.",
        f"It is read-only, or belongs to somebody else ({_short(error)}).",
        "Make it writable, or choose another --store.",
    )


def _inside(error: BaseException, place: Path | str) -> bool:
    """Whether an OSError is about a file under `place`, and not about some file of the user's."""
    name = getattr(error, "filename", None)
    return isinstance(name, str) and Path(name).is_relative_to(place)


def _short(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0][:300]
