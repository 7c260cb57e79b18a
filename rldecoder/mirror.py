"""A copy of the store elsewhere (S3, GCS, a network disk), through fsspec.

The local store stays the place where stages work; the mirror lets several machines share what
is finished. Manifests are uploaded last, so a half-uploaded artifact is never seen.
"""

from __future__ import annotations

from pathlib import Path

import fsspec

from rldecoder.errors import NoResourceError
from rldecoder.urls import without_credentials


class Mirror:
    """Artifacts under an fsspec URL such as `s3://bucket/rldecoder` or `file:///mnt/share`."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, self.base = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise NoResourceError(
                f"The mirror {without_credentials(url)} cannot be used.",
                without_credentials(str(error), url),
                "Install the fsspec backend of that protocol (s3fs, gcsfs, ...).",
            ) from None  # a traceback of the library's error would show the URL

    def has(self, name: str) -> bool:
        """Whether a file exists in the mirror."""
        return bool(self.fs.exists(f"{self.base}/{name}"))

    def upload(self, folder: Path, name: str, last: str) -> None:
        """Upload a folder; the file called `last` goes last."""
        files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
        files.sort(key=lambda f: f.relative_to(folder).as_posix() == last)
        for file in files:
            target = f"{self.base}/{name}/{file.relative_to(folder).as_posix()}"
            self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self.fs.put_file(str(file), target)

    def download(self, name: str, folder: Path) -> None:
        """Fetch every file of an artifact into `folder`."""
        prefix = f"{self.base}/{name}"
        for remote in self.fs.find(prefix):
            relative = Path(str(remote)).relative_to(Path(self.fs._strip_protocol(prefix)))
            if ".." in relative.parts:
                raise NoResourceError(
                    f"{without_credentials(self.url)} holds a file outside its artifact: {remote}."
                )
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(remote, str(target))
