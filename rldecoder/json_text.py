"""JSON of files that may be damaged or hostile, with one kind of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
"""The largest JSON file read here, a tokenizer's or the index of a model's weights, has 40 MB."""


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """`json.loads` whose every failure is a ValueError, nesting of thousands included.

    Args:
        unique_keys: refuse an object that has a key twice, of which `json.loads` keeps the last.
            For what people write; files of others' programs are read as their programs do.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested too deeply; or a key stands twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError("it is nested too deeply to be data") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return found


def read_json_file(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The JSON of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, not UTF-8, nested too deeply, or larger than `max_bytes`.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes >> 20} MB")
    return parse_json(data.decode("utf-8"))
