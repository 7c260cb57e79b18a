"""Opens a store: a folder of this machine, or a bucket."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.store import BucketUrl, S3Config
from rldecoder.errors import BadInputError
from rldecoder.urls import without_credentials


def store_place(place: Path | str) -> Path | str:
    """A place that a person names: a folder, or the URL of a bucket.

    Raises:
        BadInputError: it is a URL, and not of a bucket.
    """
    text = str(place)
    if isinstance(place, Path) or "://" not in text:
        return Path(place)
    try:
        return TypeAdapter(BucketUrl).validate_python(text)
    except ValidationError:
        raise BadInputError(
            f"The store {without_credentials(text)} cannot be used.",
            "A store is a folder, or s3://bucket/prefix without user, password and query.",
            "Keys come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        ) from None


def open_store(
    place: Path | str, mirror: str | None = None, s3: S3Config | None = None
) -> ArtifactStore:
    """The store at a place.

    Args:
        mirror: of a folder: a URL that artifacts are copied to.
        s3: how a bucket is used.

    Raises:
        BadInputError: there is no such kind of store, or boto3 is missing.
        NoResourceError: its folder cannot be made.
    """
    named = store_place(place)
    if isinstance(named, Path):
        return ArtifactStore(named, mirror=mirror)
    from rldecoder.artifacts.remote import RemoteStore  # here: most stores are folders

    return RemoteStore(named, s3 or S3Config())
