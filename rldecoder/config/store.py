"""Settings of a store that is not a folder of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from rldecoder.config.base import Config, free

BUCKET_URL = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/[A-Za-z0-9!_.*'()=+-]+)*/?$"
"""Bucket and prefix. No user, password or query: keys come from the environment."""

BucketUrl = Annotated[str, Field(pattern=BUCKET_URL, max_length=512)]


class S3Config(Config):
    """How a store in a bucket is used; read only where `store` is one.

    Keys, region and address are the environment's: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_DEFAULT_REGION, AWS_ENDPOINT_URL_S3.
    """

    cache: Path | None = free(None)
    """Folder of the local copies and of progress; null: below the per-user cache
    (`RLDECODER_CACHE`)."""
    cache_bytes: PositiveInt = free(100 << 30)
    """Local copies together, at most; those used longest ago go first, what is in use stays."""
    lease_seconds: PositiveFloat = free(60.0)
    """A lock whose holder has given no sign of life for so long is taken over."""
    attempts: PositiveInt = free(6)
    """Requests that fail are sent so many times in all, with growing pauses."""
    timeout_seconds: PositiveFloat = free(60.0)
    """How long one answer is waited for."""
    part_bytes: int = free(16 << 20, ge=5 << 20)
    """Larger files are sent in parts of this size (5 MiB at least, which is S3's own limit)."""
