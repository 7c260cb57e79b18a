"""Which files a local source reads: named ones, and those in folders, with a count of the rest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rldecoder.data.files import KNOWN, PACKED, kind_of, printable
from rldecoder.errors import BadInputError

_NOT_THE_USERS = ("__MACOSX",)
"""Folders that a packer adds; they hold no text, though their files are named like text."""


class FoundFile(NamedTuple):
    """A file to read."""

    path: Path
    name: str
    """Below the folder that was named, with `/`: no two files have the same."""
    named: bool
    """Whether the file itself was named, not only a folder above it."""


class Listing(NamedTuple):
    """What is found at the paths of a source."""

    files: list[FoundFile]
    left_out: Counter[str]
    """Files in folders that are not read, by kind: a suffix, `hidden`, ..."""


def list_files(paths: Iterable[str], taken: set[str] | None = None) -> Listing:
    """Files to read, in sorted order, folders searched. A file that is found twice is read once.

    Hidden files and folders, links to folders and files of unknown kinds are left out of folders.

    Args:
        taken: names of files that other sources have; those found here are added.

    Raises:
        BadInputError: a path does not exist, a file that is named cannot be read, or nothing is
            found.
    """
    taken = set() if taken is None else taken
    found: list[FoundFile] = []
    left_out: Counter[str] = Counter()
    seen: set[Path] = set()

    for text in paths:
        root = Path(text).expanduser()
        _check_named(root)
        inside = sorted(_search(root, left_out)) if root.is_dir() else [root]
        for path in inside:
            place = path.parent.resolve() / path.name
            if place in seen:
                continue
            seen.add(place)

            # A document's split is drawn from its name: no two files may have the same.
            named = path == root
            name = printable(path.name if named else path.relative_to(root).as_posix())
            if name in taken:
                name = printable(text if named else f"{text.rstrip('/')}/{name}")
            taken.add(name)
            found.append(FoundFile(path, name, named))

    if not found:
        raise BadInputError(
            f"No text found at {', '.join(map(printable, paths))}.",
            f"Files of these kinds are read: {KNOWN}. Left out: {told(left_out)}.",
            "Name such a file, or a folder that holds some.",
        )
    return Listing(found, left_out)


def told(counts: Counter[str]) -> str:
    """Counts as text, the largest first: `3 .bin, 1 hidden`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common()) or "nothing"


def _check_named(path: Path) -> None:
    shown = printable(path)
    if not path.exists():
        raise BadInputError(
            f"{shown} does not exist.",
            "It is named in `ingest.sources[].paths`.",
            "Correct the path; relative paths start at the working directory.",
        )
    if not path.is_dir() and not path.is_file():
        raise BadInputError(
            f"{shown} is no regular file.",
            "A pipe or device has no content that a digest could name.",
            "Write its text to a file first.",
        )
    if path.is_file() and kind_of(path) is None:
        raise BadInputError(
            f"{shown} is of a kind that is not read.",
            f"It is named in `ingest.sources[].paths`. Kinds that are read: {KNOWN}.",
            "Convert or rename it, or name it no longer.",
        )


def _search(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise BadInputError(
            f"A folder below {printable(root)} cannot be searched.",
            f"{printable(str(error))}.",
            "Make it readable, or name other folders in `ingest.sources[].paths`.",
        ) from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        for name in list(folders):
            linked = os.path.islink(os.path.join(folder, name))
            if linked or _is_hidden(name):
                folders.remove(name)
                left_out["links to folders" if linked else "hidden"] += 1
        for name in files:
            path = Path(folder, name)
            why = _why_left_out(path)
            if why is None:
                yield path
            else:
                left_out[why] += 1


def _why_left_out(path: Path) -> str | None:
    if _is_hidden(path.name):
        return "hidden"
    if not path.is_file():
        return "not regular files"
    if kind_of(path) is not None:
        return None
    last = 2 if path.suffix.lower() in PACKED else 1
    return printable("".join(path.suffixes[-last:]).lower()) or "without a suffix"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _NOT_THE_USERS
