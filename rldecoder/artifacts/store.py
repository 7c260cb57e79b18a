"""Published artifacts: what a stage leaves behind, addressed by what went into it.

An artifact is a folder `<stage>/<digest>`; its manifest is written last and the folder appears
by rename, so what can be seen is complete. The digest covers the stage's name and VERSION, the
config fields that can change the result, the derived seed, what the stage reads from outside the
store, and the digests of its inputs: never the device, paths or logging.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from rldecoder import schemas
from rldecoder.artifacts.mirror import Mirror
from rldecoder.config.base import hash_json
from rldecoder.errors import DamagedFileError, NoResourceError, StoreBusyError

MANIFEST = "manifest.json"
DIGEST_LENGTH = 16


class ArtifactRef(BaseModel):
    """All that tasks pass to each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    stage: str
    digest: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.digest}"


class FileEntry(BaseModel):
    """Size and hash of one published file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """Everything needed to know where an artifact came from and whether it is intact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    stage: str
    digest: str
    version: int
    config: dict[str, Any]
    """The stage config, all fields."""
    seed: int
    inputs: dict[str, ArtifactRef]
    fingerprint: dict[str, str]
    files: dict[str, FileEntry]
    metrics: dict[str, float | int | str | bool | None]
    verdict: str | None = None
    reasons: list[str] = []
    caveats: list[str] = []
    source_digest: str
    """SHA-256 over the stage's module and every rldecoder module that it imports."""
    git_commit: str | None
    packages: dict[str, str]
    device: str
    device_name: str
    devices: dict[str, Any] = {}
    """Cores and accelerators of the machine when the stage began (`rldecoder.devices.snapshot`)."""
    threads: int
    wall_seconds: float
    peak_memory_bytes: int
    resumed: bool
    """Whether an interrupted run's checkpoint was found; wall_seconds is then the last part's."""
    created_at: str


def artifact_digest(
    *,
    stage: str,
    version: int,
    config: dict[str, Any],
    seed: int,
    fingerprint: dict[str, str],
    inputs: dict[str, ArtifactRef],
) -> str:
    """The address of what a stage would publish, known before it runs."""
    return hash_json(
        {
            "stage": stage,
            "version": version,
            "config": config,
            "seed": seed,
            "fingerprint": fingerprint,
            "inputs": {name: ref.digest for name, ref in inputs.items()},
        }
    )[:DIGEST_LENGTH]


class ArtifactStore:
    """The artifacts under one folder, optionally mirrored to an fsspec URL (S3, ...).

    Args:
        root: the local folder; made when absent.
        mirror: fsspec URL to upload to after publishing and to fetch from when absent here.
        lock_timeout_seconds: how long to wait for another run that builds the same artifact.
    """

    def __init__(
        self, root: Path | str, mirror: str | None = None, lock_timeout_seconds: float = 86_400
    ) -> None:
        self.root = Path(root).expanduser().resolve()
        self.lock_timeout_seconds = lock_timeout_seconds
        self._verified: dict[Path, tuple[int, int, str]] = {}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NoResourceError(
                f"The store {self.root} cannot be made.", str(error), "Choose another --store."
            ) from error
        self.mirror = Mirror(mirror) if mirror else None

    def path(self, ref: ArtifactRef) -> Path:
        """The artifact's folder, whether or not it exists yet."""
        return self.root / ref.stage / ref.digest

    def progress_path(self, ref: ArtifactRef) -> Path:
        """Where a stage that was interrupted left its checkpoints."""
        return self.root / ref.stage / f"{ref.digest}.progress"

    def is_published(self, ref: ArtifactRef) -> bool:
        """Whether the manifest exists (its files are not checked)."""
        return (self.path(ref) / MANIFEST).is_file()

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Read the manifest without checking the files.

        Raises:
            DamagedFileError: it is missing or not a manifest.
        """
        path = self.path(ref) / MANIFEST
        try:
            return Manifest.model_validate(schemas.read_json(path))
        except ValidationError as error:
            raise DamagedFileError(
                f"{path} is not a manifest of this version.",
                str(error).splitlines()[0],
                f"Move {path.parent} away and run again.",
            ) from error

    def verify(self, ref: ArtifactRef) -> Manifest:
        """Check every file against the manifest.

        A file whose size and modification time were verified in this process is not read again.

        Raises:
            DamagedFileError: a file is missing, has another size, or another hash.
        """
        manifest = self.manifest(ref)
        for name, entry in manifest.files.items():
            file = self.path(ref) / name
            try:
                stat = file.stat()
            except OSError as error:
                raise DamagedFileError(f"{file} is missing.", str(error)) from error
            mark = (stat.st_size, stat.st_mtime_ns, entry.sha256)
            if self._verified.get(file) == mark:
                continue
            if stat.st_size != entry.size or hash_file(file) != entry.sha256:
                raise DamagedFileError(
                    f"{file} is not what was published.",
                    f"It has {stat.st_size} bytes; the manifest says {entry.size} bytes with "
                    f"SHA-256 {entry.sha256[:12]}....",
                )
            self._verified[file] = mark
        return manifest

    @contextmanager
    def lock(self, ref: ArtifactRef, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Hold the right to build one artifact; the kernel drops it when the holder dies.

        Raises:
            StoreBusyError: another run kept it longer than `lock_timeout_seconds`.
        """
        folder = self.root / ".locks"
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{ref.stage}-{ref.digest}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait(f"{ref} is being built by another run; waiting for it.")
            try:
                lock.acquire(timeout=self.lock_timeout_seconds, poll_interval=0.2)
            except Timeout as error:
                raise StoreBusyError(
                    f"{ref} is still being built by another run after "
                    f"{self.lock_timeout_seconds:.0f} s.",
                    "Two runs never build the same artifact.",
                    "Wait for the other run, stop it, or use another --store.",
                ) from error
        try:
            yield
        finally:
            lock.release()

    def existing(self, ref: ArtifactRef, note: Callable[[str], None]) -> Manifest | None:
        """The verified manifest when the artifact can be used, else None.

        A damaged artifact is moved aside (kept for inspection) so that it can be rebuilt.
        """
        if not self.is_published(ref) and self.mirror is not None:
            self._fetch(ref, note)
        if not self.is_published(ref):
            return None
        try:
            return self.verify(ref)
        except DamagedFileError as error:
            aside = self.path(ref).with_name(f"{ref.digest}.damaged-{time.time_ns()}")
            self.path(ref).rename(aside)
            note(f"{error} The damaged artifact was moved to {aside} and is built again.")
            return None

    @contextmanager
    def building(self, ref: ArtifactRef) -> Iterator[Path]:
        """An empty folder beside the final place; removed when the build fails."""
        aside = self.root / ref.stage / f"{ref.digest}.building"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise NoResourceError(
                    f"The disk of {self.root} is full while building {ref}.",
                    "Nothing published was touched, and checkpoints are kept.",
                    "Free some space, or choose another --store, and run again.",
                ) from error
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def publish(self, ref: ArtifactRef, folder: Path, manifest: Manifest) -> Manifest:
        """Seal `folder` and make it visible under its final name."""
        files = {}
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
                name = file.relative_to(folder).as_posix()
                files[name] = FileEntry(size=file.stat().st_size, sha256=hash_file(file))
        manifest = manifest.model_copy(update={"files": files})
        schemas.write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
        final = self.path(ref)
        folder.rename(final)
        directory = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        for name, entry in files.items():
            stat = (final / name).stat()
            self._verified[final / name] = (stat.st_size, stat.st_mtime_ns, entry.sha256)
        shutil.rmtree(self.progress_path(ref), ignore_errors=True)
        if self.mirror is not None:
            self.mirror.upload(final, str(ref), last=MANIFEST)
        return manifest

    def _fetch(self, ref: ArtifactRef, note: Callable[[str], None]) -> None:
        assert self.mirror is not None
        if not self.mirror.has(f"{ref}/{MANIFEST}"):
            return
        note(f"{ref} is fetched from {self.mirror.url}.")
        with self.building(ref) as aside:
            self.mirror.download(str(ref), aside)
            aside.rename(self.path(ref))


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
