"""Local copies of what is in a bucket: those used longest ago go first, what is in use stays.

A process that uses a copy holds a shared `flock` on a file of its name; the kernel drops it when
the process dies. A copy goes only under the exclusive lock, so never while anybody reads it, and
never before the bucket has it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from rldecoder.artifacts.manifests import MANIFEST, ArtifactRef
from rldecoder.reporting import Note

USES, PENDING = ".uses", ".pending"
_GONE = ".gone-"


class _Copy(NamedTuple):
    folder: Path
    name: str
    used: float
    size: int


class LocalCopies:
    """The copies below a folder.

    Args:
        root: of the store's local part.
        most_bytes: what they may take together.
    """

    def __init__(self, root: Path, most_bytes: int) -> None:
        self._root, self._most_bytes = root, most_bytes
        self._held: dict[str, int] = {}
        self._told = False
        for name in (USES, PENDING):
            (root / name).mkdir(exist_ok=True)

    def use(self, ref: ArtifactRef) -> None:
        """Keep a copy until `release`, or the end of this process."""
        name = _name(ref)
        if name not in self._held:
            handle = os.open(self._root / USES / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(handle, fcntl.LOCK_SH)
            self._held[name] = handle
        os.utime(self._held[name])

    @property
    def used(self) -> frozenset[str]:
        """Names of those that this process uses."""
        return frozenset(self._held)

    def release(self, names: frozenset[str]) -> None:
        """Let go of copies that are in use here."""
        for name in names & self.used:
            os.close(self._held.pop(name))

    def pend(self, ref: ArtifactRef) -> None:
        """Mark one that the bucket has not got yet."""
        (self._root / PENDING / _name(ref)).touch()

    def settle(self, ref: ArtifactRef) -> None:
        """Mark one that the bucket has."""
        (self._root / PENDING / _name(ref)).unlink(missing_ok=True)

    def make_room(self, wanted: int, note: Note) -> None:
        """Remove copies until `wanted` more bytes are within the limit, or none can go.

        Args:
            note: told, once, where the limit cannot be kept.
        """
        # Of a process that was killed while it removed them: nobody sees or counts them.
        for rest in self._root.glob(f"[!.]*/*{_GONE}*"):
            shutil.rmtree(rest, ignore_errors=True)
        copies = sorted(self._copies(), key=lambda copy: copy.used)
        total = sum(copy.size for copy in copies) + wanted
        for copy in copies:
            if total <= self._most_bytes:
                return
            if self._remove(copy):
                total -= copy.size
        if total > self._most_bytes and not self._told:
            self._told = True
            note(
                f"The local copies in {self._root} take {total:,} bytes, more than "
                f"s3.cache_bytes ({self._most_bytes:,}): all are in use, or not in the bucket yet."
            )

    def _copies(self) -> list[_Copy]:
        found = []
        for manifest in self._root.glob(f"[!.]*/*/{MANIFEST}"):
            folder = manifest.parent
            name = f"{folder.parent.name}-{folder.name}"
            if "." in folder.name:  # moved aside, or being built
                continue
            mark = self._root / USES / name
            used = mark.stat().st_mtime if mark.exists() else folder.stat().st_mtime
            size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
            found.append(_Copy(folder, name, used, size))
        return found

    def _remove(self, copy: _Copy) -> bool:
        if copy.name in self._held or (self._root / PENDING / copy.name).exists():
            return False
        handle = os.open(
            self._root / USES / copy.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Gone at once for whoever looks for it; then file by file.
            gone = copy.folder.with_name(f"{copy.folder.name}{_GONE}{time.time_ns()}")
            copy.folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        except OSError:
            return False  # in use, or gone meanwhile
        finally:
            os.close(handle)
        return True


def _name(ref: ArtifactRef) -> str:
    return f"{ref.stage}-{ref.digest}"
