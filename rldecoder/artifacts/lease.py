"""A lock between machines: an object in the bucket that its holder writes again and again.

Nobody has to trust another machine's clock. Who waits watches the object: one that has not changed
for the length of the lease, by the watcher's own clock, has lost its holder and is taken over by a
conditional write, which one of several watchers wins. A holder that was only slow notices at its
next beat that the lease is gone; what it publishes then is refused or is the same (see `remote`).
A lock that is given back stays as an object that says so.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rldecoder.artifacts.bucket import Bucket, Found
from rldecoder.errors import RlDecoderError, StoreBusyError
from rldecoder.json_text import parse_json
from rldecoder.reporting import Note

BEATS = 4
"""A holder writes so many times in the length of its lease."""
POLL_SECONDS = 1.0
GIVING_BACK_SECONDS = 10.0
"""How long the end of a block waits for the lock to be given back."""


class _Held(NamedTuple):
    etag: str
    token: str


class Lease:
    """The lock of one name.

    Args:
        seconds: after so long without a sign of life the holder counts as dead.
    """

    def __init__(self, bucket: Bucket, key: str, seconds: float) -> None:
        self._bucket, self._key, self._seconds = bucket, key, seconds

    @contextmanager
    def held(self, what: str, on_wait: Note, timeout_seconds: float) -> Iterator[None]:
        """Hold the lock for the length of the block.

        Args:
            what: what is locked, for messages.
            on_wait: told once where somebody else holds it, and when it is taken over.

        Raises:
            StoreBusyError: somebody else held it for longer than `timeout_seconds`.
        """
        held = self._acquire(what, on_wait, timeout_seconds)
        stop = threading.Event()
        beating = threading.Thread(
            target=self._beat, args=(held, stop, on_wait, what), daemon=True, name="lease"
        )
        beating.start()
        try:
            yield
        finally:
            stop.set()
            # A server that does not answer keeps nobody: the lock then ends by itself.
            beating.join(GIVING_BACK_SECONDS)

    def _acquire(self, what: str, on_wait: Note, timeout_seconds: float) -> _Held:
        deadline, told = time.monotonic() + timeout_seconds, False
        seen, since = "", time.monotonic()
        token = uuid.uuid4().hex
        while True:
            found = self._bucket.read(self._key)
            now = time.monotonic()
            if found is None:
                etag = self._bucket.write_new(self._key, self._content(token, 0))
            elif _is_free(found):
                etag = self._bucket.write_over(self._key, self._content(token, 0), found.etag)
            else:
                etag = None
                if found.etag != seen:
                    seen, since = found.etag, now
                elif now - since >= self._seconds:
                    on_wait(f"{what}: {_holder(found)} gives no sign of life; its lock is taken.")
                    etag = self._bucket.write_over(self._key, self._content(token, 0), found.etag)
            if etag is not None:
                self._bucket.require_conditions(self._key, self._content(token, -1))
                return _Held(etag, token)

            if found is not None and not told and not _is_free(found):
                on_wait(f"{what} is being built by {_holder(found)}; waiting for it.")
                told = True
            if now >= deadline:
                raise StoreBusyError(
                    f"{what} is still being built by another run after {timeout_seconds:.0f} s.",
                    "Two runs never build the same artifact.",
                    "Wait for the other run, stop it, or use another --store.",
                )
            poll = min(POLL_SECONDS, self._seconds / BEATS)
            time.sleep(poll * random.uniform(0.5, 1))

    def _beat(self, held: _Held, stop: threading.Event, on_wait: Note, what: str) -> None:
        """Write the object until the block ends, then say that it is free."""
        etag: str | None = held.etag
        beats = 0
        while not stop.wait(self._seconds / BEATS):
            beats += 1
            try:
                etag = self._renew(held, self._content(held.token, beats), str(etag))
            except RlDecoderError:
                continue  # one beat of several; and publishing says what is wrong
            if etag is None:
                on_wait(f"{what}: the lock was lost to another run, for this one was too slow.")
                return
        try:
            self._renew(held, _FREE, str(etag))
        except RlDecoderError as error:
            on_wait(f"{what}: the lock was not given back, and ends by itself ({error.what}).")

    def _renew(self, held: _Held, data: bytes, etag: str) -> str | None:
        """Write the object; None where it is another run's by now."""
        written = self._bucket.write_over(self._key, data, etag)
        if written is None:
            # A beat whose answer was lost was a beat, and the ETag is that one's.
            found = self._bucket.read(self._key)
            if found is not None and _token(found) == held.token:
                written = self._bucket.write_over(self._key, data, found.etag)
        return written

    def _content(self, token: str, beats: int) -> bytes:
        """Different at each beat, so that its ETag is."""
        return json.dumps(
            {"token": token, "beats": beats, "host": socket.gethostname(), "process": os.getpid()}
        ).encode()


_FREE = b'{"token": null}'


def _token(found: Found) -> object:
    """Whose it is; None where it was given back, or is nothing that a holder writes."""
    try:
        return parse_json(found.data)["token"]
    except (ValueError, TypeError, KeyError):
        return None


def _is_free(found: Found) -> bool:
    """Then it is anybody's."""
    return _token(found) is None


def _holder(found: Found) -> str:
    values = parse_json(found.data)
    return f"process {repr(values.get('process'))[:20]} of {str(values.get('host'))[:80]!r}"
