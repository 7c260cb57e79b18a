"""Which manifests of a store are of before seals, and may therefore have none.

Without a list of them, a manifest could be edited and its seal taken away. So the first command
that opens a store writes down those that are there, with their SHA-256; whatever has no seal later
is refused. A new store's list is empty.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from rldecoder import files, json_records
from rldecoder.errors import DamagedFileError
from rldecoder.json_text import parse_json

LIST_FILE = ".unsealed.json"
_HEX_DIGITS = 64


def record(root: Path) -> None:
    """Write the list of a store that has none; one that cannot be written to goes without."""
    path = root / LIST_FILE
    if not path.exists():
        with suppress(OSError):
            files.write_bytes(path, json_records.to_json(path, sorted(_found(root))))


def listed(root: Path) -> frozenset[str]:
    """SHA-256s of the manifests that may lack a seal.

    Raises:
        DamagedFileError: the list is none.
    """
    path = root / LIST_FILE
    try:
        values = parse_json(files.read_regular(path))
    except FileNotFoundError:
        return _found(root)
    except (OSError, ValueError):
        values = None
    if not isinstance(values, list) or not all(
        isinstance(value, str) and len(value) == _HEX_DIGITS for value in values
    ):
        raise DamagedFileError(
            f"{path} is not the list of old manifests that it should be.",
            "Manifests without a seal are read only if they are in it.",
            "Delete it: the next command lists what is there then, so look at it first.",
        )
    return frozenset(values)


def _found(root: Path) -> frozenset[str]:
    """Those without a seal that were made before the first one with."""
    old: list[tuple[str, str]] = []
    first = "~"  # after every date
    for path in root.glob("*/*/manifest.json"):
        try:
            data = files.read_regular(path)
            values = parse_json(data)
            created, sealed = str(values["created_at"]), values.get("seal") is not None
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            continue  # no manifest at all: whoever opens it says so
        if sealed:
            first = min(first, created)
        else:
            old.append((created, hashlib.sha256(data).hexdigest()))
    return frozenset(sha256 for created, sha256 in old if created < first)
