"""Objects in an S3 bucket: conditional writes, resumed reads, errors that say what to do.

boto3 retries requests that fail; what it does not retry is a body that breaks off, so reads go on
from the byte where they were. Keys come from the environment alone, and no error quotes what a
server or a library said in words: it could hold them.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rldecoder.config.store import S3Config
from rldecoder.errors import BadInputError, DamagedFileError, NoResourceError, RlDecoderError

CHUNK_BYTES = 1 << 20
_NOT_THERE = ("404", "NoSuchKey", "NotFound")
_TAKEN = ("412", "PreconditionFailed")
_AT_ONCE = ("409", "ConditionalRequestConflict")
_NO_ACCESS = (
    "401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken",
    "InvalidToken", "AllAccessDisabled",
)  # fmt: skip
_BUSY = ("503", "429", "SlowDown", "ServiceUnavailable", "RequestLimitExceeded", "Throttling")
_CLOCK = ("RequestTimeTooSkewed",)
_CANNOT = ("501", "NotImplemented")
_TOO_SHORT = ("416", "InvalidRange")


class Found(NamedTuple):
    """An object as it was when it was read."""

    data: bytes
    etag: str


class Bucket:
    """A prefix of a bucket.

    Args:
        url: `s3://bucket/prefix`.
        config: attempts, timeouts, sizes of parts.

    Raises:
        BadInputError: boto3 is not installed, or the address of the server is none.
    """

    def __init__(self, url: str, config: S3Config) -> None:
        self.url, self.config = url.rstrip("/"), config
        self.name, _, prefix = self.url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._refuses = False

        # boto3 is an extra, and slow to import.
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError:
            raise BadInputError(
                f"The store {self.url} cannot be opened.",
                "The package boto3 is not installed.",
                "`pip install -e '.[s3]'`.",
            ) from None

        # Addresses, regions and profiles are read here; its words may hold a password of theirs.
        try:
            self._client: Any = boto3.session.Session().client(
                "s3",
                config=Config(
                    retries={"total_max_attempts": config.attempts, "mode": "standard"},
                    connect_timeout=min(10.0, config.timeout_seconds),
                    read_timeout=config.timeout_seconds,
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise BadInputError(
                f"The store {self.url} cannot be opened.",
                "boto3 cannot use the address, region or profile that the environment names "
                f"({type(error).__name__}).",
                "Look at AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION and AWS_PROFILE.",
            ) from None

    def read(self, key: str) -> Found | None:
        """A small object; None where there is none."""
        for attempt in range(self.config.attempts):
            with self._explained(f"reading {key}") as said:
                answer = self._client.get_object(Bucket=self.name, Key=self._prefix + key)
                data = _body(answer["Body"])
                if len(data) == int(answer["ContentLength"]):
                    return Found(data, str(answer["ETag"]))
            if said.absent:
                return None
            self._pause(attempt)
        raise self._broken_off(key)

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        with self._explained(f"looking at {key}") as said:
            answer = self._client.head_object(Bucket=self.name, Key=self._prefix + key)
            return int(answer["ContentLength"])
        if not said.absent:
            raise self._unreachable(f"looking at {key}", "The answer broke off")
        return None

    def write_new(self, key: str, data: bytes) -> str | None:
        """Write an object that must not be there yet.

        Returns:
            Its ETag; None where there is one already.
        """
        return self._write(key, data, IfNoneMatch="*")

    def write_over(self, key: str, data: bytes, etag: str) -> str | None:
        """Replace an object that must still be the one of an ETag.

        Returns:
            The new ETag; None where another has written meanwhile.
        """
        return self._write(key, data, IfMatch=etag)

    def require_conditions(self, key: str, data: bytes) -> None:
        """See, once, that the server refuses a conditional write: some take the condition and
        write all the same.

        Args:
            key: of an object that is there.
            data: other bytes than it has.

        Raises:
            BadInputError: it wrote.
        """
        if not self._refuses and self.write_new(key, data) is not None:
            raise self._unconditional("it wrote over an object that was to be new")
        self._refuses = True

    def _write(self, key: str, data: bytes, **condition: str) -> str | None:
        for attempt in range(self.config.attempts):
            with self._explained(f"writing {key}") as said:
                answer = self._client.put_object(
                    Bucket=self.name, Key=self._prefix + key, Body=data, **condition
                )
                return str(answer["ETag"])
            if said.taken or said.absent:
                # An answer that was lost on its way may have been to this very write.
                now = self.read(key)
                return now.etag if now is not None and now.data == data else None
            self._pause(attempt)  # two writes at once: one of them is asked again
        raise self._unreachable(f"writing {key}", "The answer broke off")

    def upload(self, path: Path, key: str) -> None:
        """Write a file, in parts where it is large; an object of that key is replaced."""
        from boto3.s3.transfer import TransferConfig

        parts = TransferConfig(
            multipart_threshold=self.config.part_bytes, multipart_chunksize=self.config.part_bytes
        )
        for attempt in range(self.config.attempts):
            with self._explained(f"writing {key}") as said:
                self._client.upload_file(str(path), self.name, self._prefix + key, Config=parts)
                return
            if said.taken:
                break  # no condition was made
            self._pause(attempt)  # an answer that broke off, or parts that the server forgot
        raise self._broken_off(key)

    def download(self, key: str, path: Path, size: int, sha256: str) -> None:
        """Read an object into a new file, and check it against size and SHA-256 (hex).

        A body that breaks off is read on from there; one that is not what was published is read
        once more from its beginning, for bytes can be lost on their way, too.

        Raises:
            DamagedFileError: it is not there, or not what was published.
            NoResourceError: the server fails at every attempt.
        """
        for _ in range(2):
            if self._download(key, path, size) == sha256:
                return
        raise DamagedFileError(
            f"{self.url}/{key} is not what was published.",
            f"The manifest says {size} bytes with SHA-256 {sha256[:12]}....",
        )

    def _download(self, key: str, path: Path, size: int) -> str:
        """SHA-256 of what was read."""
        total, done, failures = hashlib.sha256(), 0, 0
        with path.open("wb") as sink:
            while done < size:
                before = done
                with self._explained(f"reading {key}") as said:
                    answer = self._client.get_object(
                        Bucket=self.name, Key=self._prefix + key, Range=f"bytes={done}-{size - 1}"
                    )
                    for chunk in _chunks(answer["Body"], size - done):
                        sink.write(chunk)
                        total.update(chunk)
                        done += len(chunk)
                if said.absent:
                    raise DamagedFileError(
                        f"{self.url}/{key} is missing.", "Its manifest names it."
                    )
                if said.short:
                    raise DamagedFileError(
                        f"{self.url}/{key} is not what was published.",
                        f"It ends before the {size} bytes that the manifest says.",
                    )
                # Attempts are counted anew where some bytes came: large files meet many faults.
                failures = 0 if done > before else failures + 1
                if failures >= self.config.attempts:
                    raise self._broken_off(key)
                if done < size:
                    self._pause(failures)
        return total.hexdigest()

    def delete(self, key: str) -> None:
        """Remove an object, or see that there is none."""
        with self._explained(f"deleting {key}") as said:
            self._client.delete_object(Bucket=self.name, Key=self._prefix + key)
        if said.broken:
            raise self._unreachable(f"deleting {key}", "The answer broke off")

    def _pause(self, attempt: int) -> None:
        time.sleep(min(5.0, 0.05 * 2**attempt) * random.uniform(0.5, 1))

    def _broken_off(self, key: str) -> RlDecoderError:
        return NoResourceError(
            f"{self.url} does not send or take {key} whole.",
            f"The connection broke off {self.config.attempts} times without a byte of progress.",
            "Look at the network and run again: it goes on from there.",
        )

    @contextmanager
    def _explained(self, doing: str) -> Iterator[_Said]:
        """Turn what boto3 raises into one clear error, or into a mark that the caller looks at."""
        from boto3.exceptions import Boto3Error, S3UploadFailedError
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            HTTPClientError,
            IncompleteReadError,
            NoCredentialsError,
            PartialCredentialsError,
            ReadTimeoutError,
            ResponseStreamingError,
        )
        from urllib3.exceptions import HTTPError

        said = _Said()
        try:
            yield said
        except (NoCredentialsError, PartialCredentialsError):
            raise self._no_access("the environment names no keys") from None
        except ClientError as error:
            error.args = (_code(error),)  # what the server wrote freely goes nowhere
            self._judge(_code(error), doing, said)
        except S3UploadFailedError as error:
            cause, error.args = error.__cause__ or error.__context__, ()
            if not isinstance(cause, ClientError):
                raise self._unreachable(doing, type(error).__name__) from None
            self._judge(_code(cause), doing, said)
        except (IncompleteReadError, ResponseStreamingError, ReadTimeoutError, HTTPError):
            said.broken = True
        except HTTPClientError as error:
            raise self._unreachable(doing, type(error).__name__) from None
        except (BotoCoreError, Boto3Error) as error:
            raise self._unreachable(doing, type(error).__name__) from None

    def _judge(self, code: str, doing: str, said: _Said) -> None:
        """Set a mark for what callers deal with; raise all else."""
        # What is no fault of anybody's: the caller asked to be told.
        if code in _NOT_THERE:
            said.absent = True
        elif code in _TAKEN:
            said.taken = True
        elif code in _AT_ONCE:
            said.broken = True
        elif code in _TOO_SHORT:
            said.short = True

        # What a person must mend.
        elif code == "NoSuchBucket":
            raise BadInputError(
                f"There is no bucket {self.name}.",
                f"The server said so when {doing}.",
                "Make it, or correct `store`.",
            ) from None
        elif code in _NO_ACCESS:
            raise self._no_access(f"the server answered {code} when {doing}") from None
        elif code in _CANNOT:
            raise self._unconditional(f"{code} when {doing}") from None
        elif code in _CLOCK:
            raise NoResourceError(
                f"The server of {self.url} refuses this machine's clock.",
                f"It answered {code} when {doing}.",
                "Set the clock.",
            ) from None

        # What may be over by the next run.
        else:
            what = "asks to slow down" if code in _BUSY else "fails"
            raise NoResourceError(
                f"The server of {self.url} {what}.",
                f"It answered {code} to {self.config.attempts} attempts when {doing}.",
                "Run again later: it goes on from there. `s3.attempts` allows more.",
            ) from None

    def _unconditional(self, why: str) -> RlDecoderError:
        return BadInputError(
            f"The server of {self.url} cannot be used as a store.",
            f"It knows no conditional writes ({why}): of two runs that publish at once, neither "
            "would notice.",
            "Use S3 itself, or a server that knows If-None-Match and If-Match.",
        )

    def _no_access(self, why: str) -> RlDecoderError:
        return BadInputError(  # no attempt of a task's mends it
            f"The bucket {self.name} refuses access.",
            f"{why[:1].upper()}{why[1:]}.",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to keys that may "
            "get, put, delete and list objects there.",
        )

    def _unreachable(self, doing: str, kind: str) -> RlDecoderError:
        return NoResourceError(
            f"The server of {self.url} cannot be reached.",
            f"{kind}, at {self.config.attempts} attempts, when {doing}.",
            "Look at the network and at AWS_ENDPOINT_URL_S3, and run again: it goes on from there.",
        )


class _Said:
    """What an answer was, where it is no error."""

    absent = False
    taken = False
    broken = False
    short = False


def _code(error: Any) -> str:
    """S3's name of an error, or its HTTP status; nothing that a server wrote freely."""
    answer = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    status = str(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    return code if code.isalnum() and len(code) < 60 else status


def _body(stream: Any) -> bytes:
    return b"".join(_chunks(stream, 1 << 40))


def _chunks(stream: Any, most: int) -> Iterator[bytes]:
    """A body in pieces; at most so many bytes, whatever a server sends."""
    try:
        while most > 0 and (chunk := stream.read(min(CHUNK_BYTES, most))):
            most -= len(chunk)
            yield chunk
    finally:
        stream.close()
