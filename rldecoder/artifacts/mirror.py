"""A copy of the store elsewhere (S3, GCS, a network disk), through fsspec.

The local store stays the place where stages work; the mirror lets several machines share what
is finished. Manifests are uploaded last, so a half-uploaded artifact is never seen. Nothing that
the mirror says is believed: only files that a sealed manifest names are fetched, and what arrives
is checked before it is put into place. A mirror that fails stops no run.
"""

from __future__ import annotations

import errno
import hashlib
import re
from pathlib import Path
from typing import Any

from rldecoder.artifacts.manifests import (
    MANIFEST,
    MOST_BYTES,
    ArtifactRef,
    FileEntry,
    Manifest,
    parse_manifest,
)
from rldecoder.errors import BadInputError, DamagedFileError, NoResourceError
from rldecoder.reporting import Note
from rldecoder.urls import without_credentials

CHUNK_BYTES = 2**24
_SECRET = re.compile(r"://([^/@\s]+)@")


class Mirror:
    """Artifacts under an fsspec URL such as `s3://bucket/rldecoder` or `file:///mnt/share`.

    Args:
        store: the folder of the store that it mirrors.

    Raises:
        NoResourceError: there is no backend for the URL's protocol.
        BadInputError: it names no folder.
    """

    def __init__(self, url: str, store: Path) -> None:
        self.url, self._store = url, store
        self.name = without_credentials(url)
        """The URL as it may be shown."""
        self._place: tuple[Any, str] | None = None
        self._left_alone = False
        import fsspec  # here, because most stores have no mirror

        protocol, path = fsspec.core.split_protocol(url)
        if not path.strip("/ "):
            raise BadInputError(
                f"The mirror {self.name!r} names no folder.",
                "It is a whole disk, or nothing at all.",
                "Name one, such as file:///mnt/share/rldecoder; `mirror: null` is none.",
            )
        try:
            fsspec.get_filesystem_class(protocol or "file")
        except (ImportError, ValueError) as error:
            raise NoResourceError(
                f"The mirror {self.name} cannot be used.",
                self._clean(error),
                "Install the fsspec backend of that protocol (s3fs, gcsfs, ...).",
            ) from None  # the cause may have the whole URL in it

    def holds(self, ref: ArtifactRef, alert: Note) -> bool:
        """Whether the mirror has the artifact, as far as its manifest says; True if unknown."""
        try:
            data = self._read_manifest(ref)
            if data is None:
                return False
            parse_manifest(data, ref, self._named(ref), self._store)
        except DamagedFileError:
            return False
        except Exception as error:  # each of fsspec's file systems raises its own
            self._give_up(f"asked for {ref}", error, alert)
        return True

    def upload(self, folder: Path, ref: ArtifactRef, manifest: Manifest, alert: Note) -> None:
        """Upload an artifact, its manifest last; a failure is told, and made good another time."""
        if self._left_alone:
            return
        try:
            fs, base = self._open()
            target = f"{base}/{ref}"
            # While files change, no manifest may say that they are whole.
            for name in (MANIFEST, *manifest.files):
                path = f"{target}/{name}"
                # What is there goes first: writing would go through a link to another file.
                if fs.lexists(path):
                    fs.rm_file(path)
            for name in (*manifest.files, MANIFEST):
                path = f"{target}/{name}"
                fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                fs.put_file(str(folder / name), path)
        except Exception as error:  # as in `holds`
            self._give_up(f"given {ref}", error, alert)

    def download(self, ref: ArtifactRef, folder: Path, note: Note, alert: Note) -> Manifest | None:
        """Fetch an artifact into an empty folder, checking each file as it comes.

        Returns:
            Its manifest; None where the mirror has no such artifact, a damaged one (which is
            noted), or cannot be used.
        """
        try:
            data = self._read_manifest(ref)
            if data is None:
                return None
            note(f"{ref} is fetched from {self.name}.")
            manifest = parse_manifest(data, ref, self._named(ref), self._store)
            for name, entry in manifest.files.items():
                self._fetch(ref, name, entry, folder / name)
        except DamagedFileError as error:
            note(f"{error.what} {error.why} It is built here instead.")
            return None
        except Exception as error:  # as in `holds`
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # nobody gets that from reading: it is the disk here
            self._give_up(f"asked for {ref}", error, alert)
            return None
        (folder / MANIFEST).write_bytes(data)
        return manifest

    def _fetch(self, ref: ArtifactRef, name: str, entry: FileEntry, target: Path) -> None:
        found = self._info(f"{ref}/{name}")
        if found is None or found.get("size") not in (None, entry.size):
            raise DamagedFileError(
                f"{self._named(ref)}/{name} is not what was published.",
                "It is missing, no plain file, or of another size.",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        total, left = hashlib.sha256(), entry.size
        fs, base = self._open()
        remote = f"{base}/{ref}/{name}"
        with fs.open(remote, "rb", block_size=CHUNK_BYTES) as source, target.open("wb") as sink:
            # One byte more than there should be tells a file that is too long.
            while left >= 0 and (chunk := source.read(min(CHUNK_BYTES, left + 1))):
                left -= len(chunk)
                total.update(chunk)
                sink.write(chunk)
        if left != 0 or total.hexdigest() != entry.sha256:
            raise DamagedFileError(
                f"{self._named(ref)}/{name} is not what was published.",
                "Its bytes have another SHA-256.",
            )

    def _read_manifest(self, ref: ArtifactRef) -> bytes | None:
        """Its bytes; None where there is none, or the mirror is left alone."""
        if self._left_alone or self._info(f"{ref}/{MANIFEST}") is None:
            return None
        fs, base = self._open()
        with fs.open(f"{base}/{ref}/{MANIFEST}", "rb") as file:
            return bytes(file.read(MOST_BYTES))

    def _info(self, name: str) -> dict[str, Any] | None:
        """What the mirror knows of a plain file; None where there is none."""
        fs, base = self._open()
        try:
            found: dict[str, Any] = fs.info(f"{base}/{name}")
        except FileNotFoundError:
            return None
        return None if found.get("type") != "file" or found.get("islink") else found

    def _open(self) -> tuple[Any, str]:
        """The file system, which some backends connect to here, and the place in it."""
        if self._place is None:
            import fsspec

            fs, base = fsspec.core.url_to_fs(self.url)
            self._place = fs, str(base).rstrip("/")
        return self._place

    def _named(self, ref: ArtifactRef) -> str:
        return f"{ref} in the mirror {self.name}"

    def _give_up(self, what: str, error: Exception, alert: Note) -> None:
        """One failure is told once: a server that is down would cost a time-out for each stage."""
        self._left_alone = True
        alert(
            f"The mirror {self.name} failed when {what} ({self._clean(error)}). This run goes on "
            f"without it; the next one uploads what it lacks."
        )

    def _clean(self, error: Exception) -> str:
        """An error's text without what the URL keeps secret."""
        text = f"{type(error).__name__}: {error}".replace(self.url, self.name)
        if secret := _SECRET.search(self.url):
            for part in (secret[1], *secret[1].split(":")[1:]):
                text = text.replace(part, "***") if part else text
        return without_credentials(text, self.url)
