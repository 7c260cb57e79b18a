"""Files that outlive a run: the per-user cache, hashes, and the disk that is left."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from rldecoder.errors import NoResourceError


def user_cache() -> Path:
    """The per-user cache folder (not created): `RLDECODER_CACHE`, else the platform's place."""
    chosen = os.environ.get("RLDECODER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rldecoder"


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_disk(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Check that the disk of `folder`, which need not exist yet, has room.

    Raises:
        NoResourceError: fewer than `needed_bytes` are free.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise NoResourceError(
            f"{purpose} needs {needed_bytes / 1e9:.1f} GB in {folder}, "
            f"but {free_bytes / 1e9:.1f} GB are free.",
            "Weights are written before they are used.",
            "Free some space, or choose another disk (`--store`, RLDECODER_CACHE).",
        )
