"""What an interrupted run left, and whether it can be trusted: sealed with a SHA-256 and an owner.

A sealed JSON file is its own hash, a newline, and the JSON that the hash is of; any flipped bit
is noticed, white space included. `owner` says whose it is (a stage's digest and a place in it), so
that another config's file is not taken up. Files that are no JSON get a sealed one beside them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rldecoder import files, json_records
from rldecoder.errors import DamagedFileError
from rldecoder.reporting import Note

_log = logging.getLogger(__name__)
SUFFIX = ".seal"


def write(path: Path, value: Any, *, owner: str = "") -> None:
    """Write sealed JSON: whole or not at all.

    Raises:
        NumericalError: the value holds NaN or infinity, which JSON cannot carry.
    """
    body = json_records.to_json(path, {"owner": owner, "value": value})
    files.write_bytes(path, _hash(body) + b"\n" + body)


def read(path: Path, *, owner: str = "") -> Any:
    """The value that `write` was given.

    Raises:
        DamagedFileError: it is missing, torn, changed in any bit, or somebody else's.
    """
    try:
        seal, _, body = files.read_regular(path).partition(b"\n")
        if seal != _hash(body):
            raise ValueError("its SHA-256 is not the one that it was written with")
        found = json.loads(body)
        if found["owner"] != owner:
            raise ValueError(f"it belongs to {found['owner']!r}, not to {owner!r}")
        return found["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFileError(
            f"{path} cannot be trusted.", f"{error}.", "Delete it: it only saves time."
        ) from error


def read_or(path: Path, default: Any, *, owner: str = "", note: Note = _log.warning) -> Any:
    """The value, or `default` where there is none that can be trusted (which is noted)."""
    if not path.exists():
        return default
    try:
        return read(path, owner=owner)
    except DamagedFileError as error:
        note(f"{error.what} {error.why} It is left out, which only costs time.")
        return default


def seal_file(path: Path, *, owner: str = "", sha256: str | None = None) -> None:
    """Put a sealed hash beside a file that was just written.

    Args:
        sha256: of its bytes, where it is known.
    """
    value = sha256 or files.hash_file(path)
    write(path.with_name(path.name + SUFFIX), {"sha256": value}, owner=owner)


def is_intact(path: Path, *, owner: str = "", note: Note = _log.warning) -> bool:
    """Whether a file is as `seal_file` found it; what is there and is not is noted."""
    try:
        sealed = read(path.with_name(path.name + SUFFIX), owner=owner)["sha256"]
        if files.hash_file(path) == sealed:
            return True
        why = "its SHA-256 is not the one that it was written with"
    except OSError as error:
        why = str(error)
    except DamagedFileError as error:
        why = error.why
    if path.exists():
        note(f"{path} cannot be trusted ({why}) and is made again.")
    return False


def walk(paths: Iterable[Path]) -> Iterator[Path]:
    """The files among `paths` and in the folders among them, in order."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_dir():
                yield file


def hashes(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file that `walk` finds, by its path relative to `root`."""
    return {file.relative_to(root).as_posix(): files.hash_file(file) for file in walk(paths)}


def first_changed(root: Path, expected: Mapping[str, str]) -> str | None:
    """The first file that is missing or not what `hashes` saw, with the reason; None if all are."""
    for name, sha256 in expected.items():
        try:
            if files.hash_file(root / name) != sha256:
                return f"{name} has another SHA-256"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def _hash(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
