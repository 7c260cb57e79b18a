"""Whose turn it is: the models answer one question at a time, and few may wait."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rldecoder.errors import RlDecoderError
from rldecoder.serve.pages import error_parts

_log = logging.getLogger(__name__)

MAX_WAITING = 4
"""Questions to the model that may wait behind the one being answered; more are turned away."""
Answer = TypeVar("Answer")
Tell = Callable[[dict[str, Any]], None]
"""Takes one line of an answer that comes in lines."""


class BusyError(RlDecoderError):
    """Too many questions wait already."""


class GoneError(Exception):
    """Nobody reads the answer any more."""


class OneAtATime:
    """Runs work in a thread, one piece at a time: it fills all cores, and the models' hooks are
    not made for two."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._inside = 0  # counted here: anyio's own count of those that wait lags behind a burst
        self._limiter: anyio.CapacityLimiter | None = None

    async def run(self, work: Callable[[], Answer]) -> Answer:
        """The result of `work`.

        Raises:
            BusyError: too many wait already.
        """
        if self._limiter is None:  # it belongs to the event loop that serves
            self._limiter = anyio.CapacityLimiter(1)
        if self._inside > self.max_waiting:
            raise BusyError(
                "The server is busy.",
                f"{self.max_waiting} questions are waiting for the model already.",
                "Try again in a moment.",
            )
        self._inside += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._inside -= 1


class Lines(Response):
    """An answer that comes in lines of JSON while the model works on it.

    When the reader goes away, the next line that is told raises GoneError in the working thread,
    so that the model is free again. What fails before the first line is an error like any other;
    later it is the last line.
    """

    media_type = "application/x-ndjson"

    def __init__(self, model: OneAtATime, work: Callable[[Tell], None]) -> None:
        super().__init__()
        self._model, self._work = model, work
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines as they come."""
        gone, begun = threading.Event(), False

        async def line(value: dict[str, Any]) -> None:
            nonlocal begun
            if not begun:
                begun = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})

        def tell(value: dict[str, Any]) -> None:
            if gone.is_set():
                raise GoneError
            anyio.from_thread.run(line, value)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            try:
                await self._model.run(lambda: self._work(tell))
            except Exception as error:  # a group would wrap it
                failure = error
            tasks.cancel_scope.cancel()

        if isinstance(failure, GoneError):
            return
        if failure is not None:
            if not begun:
                raise failure
            if not isinstance(failure, RlDecoderError):
                _log.error("an answer broke off", exc_info=failure)
            await line({"error": error_parts(*_said(failure))})
        await send({"type": "http.response.body", "body": b""})


def _said(error: Exception) -> tuple[str, str, str]:
    if isinstance(error, RlDecoderError):
        return error.what, error.why, error.mend
    return (
        "The server made a mistake.",
        f"{type(error).__name__}; the terminal that runs it says more.",
        "Try again, and please report it if it stays.",
    )
