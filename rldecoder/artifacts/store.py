"""Published artifacts: what a stage leaves behind, addressed by what went into it.

An artifact is a folder `<stage>/<digest>`; its manifest is written last and the folder appears
by rename, so what can be seen is complete. The digest covers the stage's name and VERSION, the
config fields that can change the result, the derived seed, what the stage reads from outside the
store, and the digests of its inputs: never the device, paths or logging.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rldecoder import files
from rldecoder.artifacts import unsealed
from rldecoder.artifacts.manifests import (
    DIGEST_LENGTH,
    MANIFEST,
    ArtifactRef,
    FileEntry,
    Manifest,
    artifact_digest,
    read_manifest,
    write_manifest,
)
from rldecoder.artifacts.mirror import Mirror
from rldecoder.errors import DamagedFileError, NoResourceError, StoreBusyError
from rldecoder.reporting import Note

__all__ = [
    "DIGEST_LENGTH", "MANIFEST", "ArtifactRef", "ArtifactStore", "FileEntry", "Manifest",
    "artifact_digest",
]  # fmt: skip
_log = logging.getLogger(__name__)
_REBUILD = "Run again with the config that built it: it is moved aside and built anew."


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
        self._verified: dict[Path, tuple[int, ...]] = {}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NoResourceError(
                f"The store {self.root} cannot be made.", str(error), "Choose another --store."
            ) from error
        unsealed.record(self.root)
        self.mirror = Mirror(mirror, self.root) if mirror else None

    @property
    def place(self) -> str:
        """Where the store is, as it may be shown and named again."""
        return str(self.root)

    def looked_at(self, ref: ArtifactRef) -> Manifest:
        """What can be said of an artifact in passing: its manifest and sizes are checked.

        Raises:
            DamagedFileError: the manifest was changed, or a file is missing or of another size.
        """
        manifest = self.manifest(ref)
        for name, entry in manifest.files.items():
            file = self.path(ref) / name
            if not file.is_file() or file.stat().st_size != entry.size:
                raise DamagedFileError(
                    f"{file} is not what was published.",
                    f"It is missing, or does not have the manifest's {entry.size} bytes.",
                    _REBUILD,
                )
        return manifest

    @contextmanager
    def session(self) -> Iterator[None]:
        """What is used in the block may be let go of at its end; a folder has nothing to let go."""
        yield

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
            DamagedFileError: it is missing, was changed, or is not that of `ref`.
        """
        return read_manifest(self.path(ref) / MANIFEST, ref)

    def verify(self, ref: ArtifactRef) -> Manifest:
        """Check the manifest, and every file against it.

        A file that was verified in this process and not changed since is not read again.

        Raises:
            DamagedFileError: a file is missing, has another size or hash, is no regular file, or
                is not named by the manifest.
            NoResourceError: a file is there and may not be read.
        """
        manifest = self.manifest(ref)
        strangers = _strangers(self.path(ref), manifest)
        if strangers:
            raise DamagedFileError(
                f"{strangers[0]} was never published.",
                "The manifest does not name it, or it is a link or no file at all.",
                "Move it away.",
            )
        for name, entry in manifest.files.items():
            self._verify_file(self.path(ref) / name, entry)
        return manifest

    def _verify_file(self, file: Path, entry: FileEntry) -> None:
        try:
            mark = _mark(file)
            if self._verified.get(file) == mark:
                return
            size = mark[0]
            sha256 = files.hash_file(file) if size == entry.size else ""
        except OSError as error:
            raise files.unreadable(file, error, _REBUILD) from error
        if sha256 != entry.sha256:
            raise DamagedFileError(
                f"{file} is not what was published.",
                f"It has {size} bytes; the manifest says {entry.size} bytes with "
                f"SHA-256 {entry.sha256[:12]}....",
                _REBUILD,
            )
        self._verified[file] = mark

    @contextmanager
    def lock(self, ref: ArtifactRef, on_wait: Note) -> Iterator[None]:
        """Hold the right to build one artifact; the kernel drops it when the holder dies.

        Raises:
            StoreBusyError: another run kept it longer than `lock_timeout_seconds`.
            NoResourceError: its file cannot be made, or is no file.
        """
        from filelock import FileLock, Timeout  # here, because looking locks nothing

        folder = self.root / ".locks"
        path = folder / f"{ref.stage}-{ref.digest}.lock"
        with files.explained(self.root, f"locking {ref}"):
            files.clear_for_folder(folder, on_wait)
            folder.mkdir(exist_ok=True)
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                # A link would have the file that it names opened, and emptied.
                on_wait(f"{path} is no lock file; it was moved to {files.move_aside(path)}.")
            lock = FileLock(path)
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

    def existing(self, ref: ArtifactRef, note: Note, alert: Note | None = None) -> Manifest | None:
        """The verified manifest when the artifact can be used, else None.

        A damaged artifact, or what stands in its place, is moved aside (kept for inspection) so
        that it can be rebuilt; files in it that were never published are moved out. A mirror that
        lacks it gets it now.

        Args:
            alert: told when the mirror cannot be used; `note` where there is none.
        """
        with files.explained(self.root, f"looking for {ref}"):
            files.clear_for_folder(self.path(ref).parent, note)
            manifest = self._intact(ref, note)
            if self.mirror is None:
                return manifest
            if manifest is None:
                self._fetch(ref, note, alert or note)
                return self._intact(ref, note)
        if not self.mirror.holds(ref, alert or note):
            self.mirror.upload(self.path(ref), ref, manifest, alert or note)
        return manifest

    def _intact(self, ref: ArtifactRef, note: Note) -> Manifest | None:
        """The verified manifest; what stands in its place and is none is moved aside."""
        place = self.path(ref)
        if not os.path.lexists(place):
            return None
        try:
            self._clear(ref, note)
            return self.verify(ref)
        except DamagedFileError as error:
            note(
                f"{error.what} {error.why} The damaged artifact was moved to "
                f"{files.move_aside(place)} and is built again."
            )
            return None

    def _clear(self, ref: ArtifactRef, note: Note) -> None:
        """Move out what was never published: it may be read as a part, but spoils nothing else."""
        place = self.path(ref)
        strangers = _strangers(place, self.manifest(ref))
        if not strangers:
            return
        out = files.move_aside_name(place, "unpublished")
        for stranger in strangers:
            target = out / stranger.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            stranger.rename(target)
            note(f"{stranger} was never published; it was moved to {target}.")

    def make_progress(self, ref: ArtifactRef, note: Note) -> Path:
        """The folder for checkpoints, made where it is not there yet."""
        path = self.progress_path(ref)
        with files.explained(self.root, f"preparing {ref}"):
            files.clear_for_folder(path.parent, note)
            files.clear_for_folder(path, note)
            path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def building(self, ref: ArtifactRef) -> Iterator[Path]:
        """An empty folder beside the final place; removed when the build fails."""
        aside = self.root / ref.stage / f"{ref.digest}.building"
        with files.explained(self.root, f"building {ref}"):
            files.remove(aside)
            aside.mkdir(parents=True)
            try:
                yield aside
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def publish(
        self, ref: ArtifactRef, folder: Path, manifest: Manifest, alert: Note = _log.warning
    ) -> Manifest:
        """Seal `folder` and make it visible under its final name, then upload it to the mirror.

        Args:
            alert: told when the mirror cannot be written; the artifact stands all the same, and
                the next run uploads it.
        """
        entries = {}
        for file in sorted(folder.rglob("*")):
            if file.is_dir():
                files.fsync(file)
                continue
            sha256 = files.hash_file(file)
            files.fsync(file)
            name = file.relative_to(folder).as_posix()
            entries[name] = FileEntry(size=file.stat().st_size, sha256=sha256)
        manifest = write_manifest(folder, manifest.model_copy(update={"files": entries}))
        final = self.path(ref)
        folder.rename(final)
        files.fsync(final.parent)
        # Before the marks: shards may be linked from there, and losing a link is a change.
        shutil.rmtree(self.progress_path(ref), ignore_errors=True)
        self._mark_all(final, manifest)
        if self.mirror is not None:
            self.mirror.upload(final, ref, manifest, alert)
        return manifest

    def _mark_all(self, final: Path, manifest: Manifest) -> None:
        for name in manifest.files:
            self._verified[final / name] = _mark(final / name)

    def _fetch(self, ref: ArtifactRef, note: Note, alert: Note) -> None:
        assert self.mirror is not None
        with self.building(ref) as aside:
            manifest = self.mirror.download(ref, aside, note, alert)
            if manifest is None:
                return
            aside.rename(self.path(ref))
            files.fsync(self.path(ref).parent)
            self._mark_all(self.path(ref), manifest)


def _mark(file: Path) -> tuple[int, ...]:
    """What changes when a file does; its size comes first."""
    stat = file.lstat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _strangers(folder: Path, manifest: Manifest) -> list[Path]:
    """What lies in an artifact's folder and was not published, links and pipes included."""
    known = {folder / name for name in manifest.files} | {folder / MANIFEST}
    out = []
    for here, folders, names in os.walk(folder):
        paths = [Path(here) / name for name in names]
        links = [path for name in folders if (path := Path(here) / name).is_symlink()]
        out += [path for path in paths if path not in known] + links
    return sorted(out)
