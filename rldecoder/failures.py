"""Failures that can be foreseen, whoever raises them, as errors with three sentences.

Full disks, missing rights, lack of memory, text that is not Unicode, damaged files: libraries raise
each in many classes. `foreseen` knows them, `translated` does it for a block of code, and what
neither knows is a fault of this program (`UnexpectedError`, exit code 70).
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rldecoder.errors import (
    BadInputError,
    DamagedFileError,
    NoResourceError,
    RlDecoderError,
    UnexpectedError,
)
from rldecoder.urls import without_credentials

SHOWN_CHARACTERS = 300

_GOES_ON = "Nothing published was touched; the same command goes on from the last checkpoint."
_MEMORY = ("Not enough memory.", f"Lower batch sizes, or use a machine with more. {_GOES_ON}")


class _Kind(NamedTuple):
    """What is said of some error numbers of the operating system."""

    numbers: frozenset[int]
    error: type[RlDecoderError]
    what: str
    mend: str


def _numbers(*names: str) -> frozenset[int]:
    """The numbers by their names; systems lack one or the other."""
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


_KINDS = (
    _Kind(
        _numbers("ENOSPC", "EDQUOT", "EFBIG"), NoResourceError, "The disk is full",
        f"Free some space, or choose another --store. {_GOES_ON}",
    ),
    _Kind(
        _numbers("EROFS", "EACCES", "EPERM"), BadInputError, "The system does not permit this",
        "Change the rights, or choose another path (for a store: --store).",
    ),
    _Kind(
        _numbers("ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ELOOP", "ENAMETOOLONG", "ENXIO",
                 "ENODEV", "ENOTEMPTY", "EILSEQ", "EINVAL"),
        BadInputError, "A file or folder cannot be used", "Name another one.",
    ),
    _Kind(
        _numbers("EMFILE", "ENFILE"), NoResourceError, "Too many files are open",
        "Raise the limit: `ulimit -n 4096`.",
    ),
    _Kind(
        _numbers("ENOMEM", "EAGAIN"), NoResourceError, "The system has no memory left", _MEMORY[1]
    ),
)  # fmt: skip
_OTHER_KIND = _Kind(
    frozenset(), NoResourceError, "The system refused",
    f"Look at the disk, the network and the system's log, then run again. {_GOES_ON}",
)  # fmt: skip

_DATA_MODULES = (
    "pyarrow", "safetensors", "zlib", "_lzma", "lzma", "zipfile", "tarfile", "zstandard",
    "compression", "_zstd", "json",
)  # fmt: skip
"""Their errors come from what is in a file."""
_NETWORK_MODULES = (
    "httpx", "httpcore", "requests", "urllib3", "huggingface_hub", "aiohttp", "botocore", "fsspec",
    "http",
)  # fmt: skip
_PARSERS = ("json", "yaml")

# Errors of Rust libraries and of torch carry the number, or the words, in their text alone.
_RUST_NUMBER = re.compile(r"(?:\(os error |Os \{ code: )(\d+)")
_NO_MEMORY = re.compile(r"allocate memory|out of memory|not enough memory|can't start new thread")


@contextmanager
def translated(during: str = "") -> Iterator[None]:
    """Raise what can be foreseen as one of our own errors; let all else pass.

    Args:
        during: what is done in the block, a stage's name, say; goes into the error.
    """
    try:
        yield
    except RlDecoderError:
        raise
    except Exception as error:  # of many libraries; `foreseen` knows which are no fault of ours
        known = foreseen(error, during)
        if known is not None:
            raise known from error
        if during:
            error.add_note(f"This happened in {during}.")
        raise


def foreseen(error: BaseException, during: str = "") -> RlDecoderError | None:
    """Our error for one of a library or the system, or None for a fault of this program."""
    if isinstance(error, RlDecoderError):
        return error
    place = f" (in {during})" if during else ""
    text = shown(error)

    # What the system refused, whichever library hands its number on.
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    rust = _RUST_NUMBER.search(str(error))
    if rust or (isinstance(error, OSError) and isinstance(error.errno, int)):
        number = int(rust[1]) if rust else getattr(error, "errno", 0)
        return _of_the_system(number, text, place)

    if isinstance(error, MemoryError) or _is_lack_of_memory(error):
        return NoResourceError(f"{_MEMORY[0][:-1]}{place}.", text, _MEMORY[1])
    if isinstance(error, UnicodeError):
        return BadInputError(
            f"A text is not valid Unicode{place}.", _unicode_fault(error), "Save it as UTF-8."
        )
    if isinstance(error, RecursionError) and _is_in_a_parser(error):
        return BadInputError(f"A text is nested too deeply{place}.", "", "Give it fewer levels.")

    # Known by who raised it alone: libraries have more classes than can be listed.
    if modules & set(_NETWORK_MODULES) or isinstance(error, OSError):
        return NoResourceError(f"{_OTHER_KIND.what}{place}.", text, _OTHER_KIND.mend)
    if isinstance(error, EOFError) or any(name.startswith(_DATA_MODULES) for name in modules):
        return DamagedFileError(
            f"A file is damaged, or of another kind than it was taken for{place}.",
            text,
            "Replace it. An artifact of the store is built anew by the same command.",
        )
    return None


def unexpected(error: BaseException) -> UnexpectedError:
    """The error for what nobody foresaw; its traceback goes to a file that only the user reads."""
    if isinstance(error, UnexpectedError):
        what = error.what
    else:
        what = f"RL-Decoder has a fault that was not foreseen: {shown(error)}"
    trace = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="rldecoder-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(trace)
    except OSError:
        why = f"No file could be written, so here is the traceback:\n{trace}"
    else:
        why = f"The traceback is in {path}"
    return UnexpectedError(
        what,
        why,
        "Please report it with that text (look through it first: it may quote your input). "
        + _GOES_ON,
    )


def shown(error: BaseException) -> str:
    """An error of others in one line: its class and its words, without what is secret or long."""
    lines = str(error).strip().splitlines()
    words = without_credentials(lines[0].strip()) if lines else ""
    words = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
    if len(words) > SHOWN_CHARACTERS:
        words = words[:SHOWN_CHARACTERS] + "..."
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _of_the_system(number: int, text: str, place: str) -> RlDecoderError:
    kind = next((kind for kind in _KINDS if number in kind.numbers), _OTHER_KIND)
    return kind.error(f"{kind.what}{place}.", text, kind.mend)


def _is_lack_of_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _unicode_fault(error: UnicodeError) -> str:
    """Where it is; never the text itself, which may be anything."""
    if isinstance(error, UnicodeDecodeError | UnicodeEncodeError):
        return f"{error.encoding}, position {error.start:,}: {error.reason}."
    return type(error).__name__


def _is_in_a_parser(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(
        str(frame.f_globals.get("__name__", "")).split(".")[0] in _PARSERS for frame, _ in frames
    )
