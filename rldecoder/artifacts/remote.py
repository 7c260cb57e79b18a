"""A store in an S3 bucket, with local copies to work on.

An artifact is `<stage>/<digest>/files/<SHA-256>` and, written last and only if there is none yet,
`<stage>/<digest>/manifest.json`: who sees a manifest sees all of its files, and two runs that
publish at once never mix theirs, for files are named by their content. Nothing that the bucket
says is believed: manifests are sealed, and every file is hashed as it comes. Checkpoints
(`progress/`), reviews and what wandb keeps stay on this machine.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rldecoder import files
from rldecoder.artifacts.bucket import Bucket
from rldecoder.artifacts.lease import Lease
from rldecoder.artifacts.local_copies import LocalCopies
from rldecoder.artifacts.manifests import MANIFEST, ArtifactRef, FileEntry, Manifest, parse_manifest
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.store import S3Config
from rldecoder.errors import DamagedFileError
from rldecoder.lm.user_cache import user_cache
from rldecoder.reporting import Note

_log = logging.getLogger(__name__)


class RemoteStore(ArtifactStore):
    """The artifacts below `s3://bucket/prefix`; `root` is the folder of the local copies.

    Args:
        url: of the bucket, without user or password.
        lock_timeout_seconds: as of `ArtifactStore`.

    Raises:
        BadInputError: boto3 is missing.
        NoResourceError: the folder cannot be made.
    """

    def __init__(self, url: str, config: S3Config, lock_timeout_seconds: float = 86_400) -> None:
        self.url, self.config = url.rstrip("/"), config
        super().__init__(cache_folder(url, config), lock_timeout_seconds=lock_timeout_seconds)
        self._bucket = Bucket(url, config)
        self._copies = LocalCopies(self.root, config.cache_bytes)

    @property
    def place(self) -> str:
        """The bucket's URL."""
        return self.url

    def is_published(self, ref: ArtifactRef) -> bool:
        """Whether the bucket, or this machine, has the manifest."""
        return super().is_published(ref) or self._bucket.size(_manifest_key(ref)) is not None

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """The manifest, of the local copy or from the bucket; files are not fetched."""
        if super().is_published(ref):
            return super().manifest(ref)
        found = self._bucket.read(_manifest_key(ref))
        if found is None:
            raise DamagedFileError(
                f"{ref} is not in {self.url}.", "", "Run with the config that builds it."
            )
        return parse_manifest(found.data, ref, self._named(ref), self.root)

    def verify(self, ref: ArtifactRef) -> Manifest:
        """As of `ArtifactStore`, of the local copy, which is fetched where there is none."""
        self._copies.use(ref)
        if not super().is_published(ref):
            with super().lock(ref, _log.info):
                if not super().is_published(ref):
                    self._download(ref, _log.info)
        return super().verify(ref)

    def looked_at(self, ref: ArtifactRef) -> Manifest:
        """The local copy verified where there is one, else the bucket's manifest alone."""
        return super().verify(ref) if super().is_published(ref) else self.manifest(ref)

    @contextmanager
    def lock(self, ref: ArtifactRef, on_wait: Note) -> Iterator[None]:
        """Hold the right to build one artifact, on this machine and among all that use the bucket.

        Raises:
            StoreBusyError: another run kept it longer than `lock_timeout_seconds`.
        """
        lease = Lease(
            self._bucket, f".locks/{ref.stage}-{ref.digest}.json", self.config.lease_seconds
        )
        with ExitStack() as stack:
            stack.enter_context(super().lock(ref, on_wait))
            # What both have is not built: a look at its files needs no lock among machines. Where
            # they are damaged here, they come from there.
            if not self._is_settled(ref):
                stack.enter_context(lease.held(str(ref), on_wait, self.lock_timeout_seconds))
            yield

    def _is_settled(self, ref: ArtifactRef) -> bool:
        """Whether this machine and the bucket have the same manifest."""
        path = self.path(ref) / MANIFEST
        if not path.is_file():
            return False
        found = self._bucket.read(_manifest_key(ref))
        return found is not None and found.data == path.read_bytes()

    def existing(self, ref: ArtifactRef, note: Note, alert: Note | None = None) -> Manifest | None:
        """The verified manifest of the local copy, or of one that is fetched now; else None.

        What the bucket lacks is uploaded; what is damaged there is taken out of the way.
        """
        self._copies.use(ref)
        with files.explained(self.root, f"looking for {ref}"):
            files.clear_for_folder(self.path(ref).parent, note)
            manifest = self._intact(ref, note)
            if manifest is not None:
                return self._upload(ref, manifest, note)
            try:
                return self._download(ref, note)
            except DamagedFileError as error:
                note(f"{error.what} {error.why} It is built here instead.")
                self._set_aside(ref)
                return None

    def publish(
        self, ref: ArtifactRef, folder: Path, manifest: Manifest, alert: Note = _log.warning
    ) -> Manifest:
        """Publish here, then in the bucket: files first, the manifest last.

        Raises:
            NoResourceError: the bucket does not take it; it stands here, and the next run uploads
                it.
        """
        self._copies.pend(ref)
        manifest = super().publish(ref, folder, manifest, alert)
        self._copies.use(ref)
        manifest = self._upload(ref, manifest, alert)
        self._copies.make_room(0, alert)
        return manifest

    @contextmanager
    def session(self) -> Iterator[None]:
        """Let go, at its end, of the copies that the block began to use."""
        before = self._copies.used
        try:
            yield
        finally:
            self._copies.release(self._copies.used - before)

    def _intact(self, ref: ArtifactRef, note: Note) -> Manifest | None:
        """As of `ArtifactStore`; what has no manifest here is no copy, whatever the bucket says."""
        place = self.path(ref)
        if os.path.lexists(place) and not super().is_published(ref):
            note(f"{place} is no whole copy; it was moved to {files.move_aside(place)}.")
        return super()._intact(ref, note)

    def _upload(self, ref: ArtifactRef, manifest: Manifest, note: Note) -> Manifest:
        """Give the bucket what it lacks; the manifest that stands there then, and here."""
        data = (self.path(ref) / MANIFEST).read_bytes()
        there = self._trusted(ref, note)
        if there is None:
            self._copies.pend(ref)
            for name, entry in manifest.files.items():
                key = _file_key(ref, entry)
                # The name says what is in it: a file that an interrupted upload has brought stays.
                if self._bucket.size(key) != entry.size:
                    self._bucket.upload(self.path(ref) / name, key)
            if self._bucket.write_new(_manifest_key(ref), data) is None:
                there = self._trusted(ref, note)
        self._copies.settle(ref)
        if there is None or there == data:
            return manifest

        # Another run was first, and its bytes differ (another CPU rounds differently): all that
        # use the bucket read the same ones.
        note(f"{ref} was published by another run meanwhile; its copy is taken.")
        files.remove(self.path(ref))
        taken = self._download(ref, note)
        if taken is None:
            raise DamagedFileError(f"{ref} was taken out of {self.url}.", "", "Run again.")
        return taken

    def _trusted(self, ref: ArtifactRef, note: Note) -> bytes | None:
        """The bucket's manifest; None where there is none, or a damaged one, which goes aside."""
        found = self._bucket.read(_manifest_key(ref))
        if found is None:
            return None
        try:
            parse_manifest(found.data, ref, self._named(ref), self.root)
        except DamagedFileError as error:
            note(f"{error.what} {error.why} This machine's copy is uploaded instead.")
            self._set_aside(ref)
            return None
        return found.data

    def _download(self, ref: ArtifactRef, note: Note) -> Manifest | None:
        """Fetch an artifact, each file hashed as it comes; None where there is none.

        Raises:
            DamagedFileError: it is not what was published.
        """
        found = self._bucket.read(_manifest_key(ref))
        if found is None:
            return None
        manifest = parse_manifest(found.data, ref, self._named(ref), self.root)
        note(f"{ref} is fetched from {self.url}.")
        self._copies.make_room(sum(entry.size for entry in manifest.files.values()), note)
        with self.building(ref) as aside:
            for name, entry in manifest.files.items():
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._bucket.download(_file_key(ref, entry), target, entry.size, entry.sha256)
            (aside / MANIFEST).write_bytes(found.data)
            aside.rename(self.path(ref))
            files.fsync(self.path(ref).parent)
        self._mark_all(self.path(ref), manifest)
        return manifest

    def _set_aside(self, ref: ArtifactRef) -> None:
        """Take a damaged artifact's manifest, and files, out of the way; only a builder does."""
        found = self._bucket.read(_manifest_key(ref))
        if found is None:
            return
        kept = f"{ref}/{MANIFEST}.damaged-{hashlib.sha256(found.data).hexdigest()[:12]}"
        self._bucket.write_new(kept, found.data)
        self._bucket.delete(_manifest_key(ref))
        try:
            manifest = parse_manifest(found.data, ref, self._named(ref), self.root)
        except DamagedFileError:
            return  # whatever it names, its files are written only where they are missing
        for entry in manifest.files.values():
            self._bucket.delete(_file_key(ref, entry))

    def _named(self, ref: ArtifactRef) -> str:
        return f"{ref} in {self.url}"


def cache_folder(url: str, config: S3Config) -> Path:
    """Where the local copies of a bucket's artifacts are."""
    if config.cache is not None:
        return config.cache.expanduser()
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return user_cache() / "stores" / name


def _manifest_key(ref: ArtifactRef) -> str:
    return f"{ref}/{MANIFEST}"


def _file_key(ref: ArtifactRef, entry: FileEntry) -> str:
    return f"{ref}/files/{entry.sha256}"
