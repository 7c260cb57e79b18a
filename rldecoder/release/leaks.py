"""Before anything is published: no key of a service, and no path of this machine, is in it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from rldecoder import files
from rldecoder.config.problems import looks_like_a_key
from rldecoder.errors import BadInputError
from rldecoder.lm.user_cache import user_cache

_SECRET_NAME = re.compile(r"(?i)(?:^|_)(?:api_?key|key|token|secret|passw(?:or)?d|credentials?)$")
_SHORTEST_SECRET = 8
# `/...`, `~/...`, `C:\...`, `\\server\...`, `file:...`
_LOCAL = re.compile(r"(?:/|~[^/\s]*/|[A-Za-z]:[\\/]|\\\\|file:)")
# On every machine, and in many texts.
_EVERYWHERE = frozenset(
    map(Path, ("/usr/local", "/usr/lib", "/usr/bin", "/usr/share", "/var/lib", "/var/tmp"))
)
_LAST_PART = re.compile(r"[^/\\]+(?=[/\\]*$)")


def without_places(value: Any) -> Any:
    """Plain values in which every path that starts at a root has become its last part.

    Keys too: some are paths. What is relative says nothing of a machine, and stays.
    """
    if isinstance(value, str):
        if not _LOCAL.match(value):
            return value
        last = _LAST_PART.search(value)
        return last[0] if last else ""
    if isinstance(value, Mapping):
        return {without_places(str(key)): without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return value


def require_no_leaks(root: Path, names: Iterable[str], places: Iterable[Path | str] = ()) -> None:
    """Refuse files that hold a key of a service, or a path of this machine.

    Args:
        root: the folder that is to be published.
        names: its files.
        places: paths of the run, beside those that every process has.

    Raises:
        BadInputError: one does; the file is named, a key is not.
    """
    secrets = [
        value.encode()
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
    ]
    needles = _needles(places)
    for name in names:
        data = b"\n".join(_contents(root / name))
        if any(secret in data for secret in secrets) or looks_like_a_key(
            data.decode("utf-8", errors="replace")
        ):
            raise BadInputError(
                f"{name} holds what looks like a key of a service.",
                "Whoever reads the release could use it.",
                "Take it out of the text or the config that it came from, and run again.",
            )
        for needle, place in needles.items():
            if needle in data:
                raise BadInputError(
                    f"{name} holds a path of this machine, {place}.",
                    "It says where the run was made, and means nothing elsewhere.",
                    "Take it out of the text or the config that it came from, and run again.",
                )


def _needles(places: Iterable[Path | str]) -> dict[bytes, str]:
    """What to look for, by the bytes that give a place away."""
    found: dict[bytes, str] = {}
    for place in (Path.cwd(), Path.home(), sys.prefix, user_cache(), *places):
        for path in {Path(place), Path(place).expanduser().absolute(), Path(place).resolve()}:
            if not path.is_absolute() or len(path.parts) < 2 or path in _EVERYWHERE:
                continue
            # `/root` or `/data` are words as well: only a text that begins there is a path.
            text = f'"{path}/' if len(path.parts) == 2 else str(path)
            found[text.encode(errors="surrogateescape")] = str(path)
    return found


def _contents(path: Path) -> Iterator[bytes]:
    """Where a file can hold text: its bytes, of tensors the header, and what Parquet packs."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as tensors:
            yield json.dumps(tensors.metadata()).encode()
            yield "\n".join(tensors.keys()).encode()
        return
    yield files.read_regular(path)
    if path.suffix == ".parquet":
        for column in pq.read_table(path).columns:
            for texts in _texts(column.combine_chunks()):
                yield '"'.join(["", *(text or "" for text in texts.unique().to_pylist())]).encode()


def _texts(column: pa.Array | pa.ChunkedArray) -> Iterator[pa.Array]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        yield column
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        yield from _texts(column.flatten())
    elif pa.types.is_struct(column.type):
        for part in column.flatten():
            yield from _texts(part)
