"""Connections have an end: who never finishes a request, or never reads the answer, is dropped.

uvicorn limits how long a connection may idle between two requests, and nothing else: a client that
sends a byte now and then, or none at all, keeps its connection for ever, and enough of them keep
everyone else out.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 20.0
"""From the first byte of a request to its last; a body has 128 KiB at most."""
ANSWER_SECONDS = 60.0
"""For which a client may leave an answer unread while it fills the buffers."""
MAX_CONNECTIONS = 64
"""One more takes the place of the one that has been without a question for longest."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with limits on how long a client may take."""

    request_seconds = REQUEST_SECONDS
    answer_seconds = ANSWER_SECONDS
    max_connections = MAX_CONNECTIONS

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._silent_since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection: its first request is awaited from now on."""
        super().connection_made(transport)
        self._reading = self.loop.call_later(self.request_seconds, transport.abort)
        if len(self.connections) > self.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Some of a request: the clock runs until it is whole."""
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        """An answer is sent: the rest of its request, or the beginning of the next, may be here."""
        super().on_response_complete()
        self._silent_since = self.loop.time()
        self._watch_request()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        _stop(self._writing)
        self._writing = None

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        super().connection_lost(exc)
        _stop(self._reading)
        _stop(self._writing)

    def _watch_request(self) -> None:
        """Keep the clock running while part of a request is missing; stop it otherwise."""
        if self.transport.is_closing():  # which waits until the last answer is read
            _stop(self._reading)
            self._reading = None
            if self._writing is None:
                self._writing = self.loop.call_later(self.answer_seconds, self.transport.abort)
            return
        state = self.conn.their_state
        if self.transport.get_protocol() is not self:  # it is a websocket's now
            state = h11.DONE
        begun = state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not (begun or state is h11.SEND_BODY):
            _stop(self._reading)
            self._reading = None
        elif self._reading is None:
            self._reading = self.loop.call_later(self.request_seconds, self.transport.abort)

    def _make_room(self) -> None:
        """Drop the connection that has been without a question for longest, or this new one."""
        oldest = min(
            (other for other in self.connections if isinstance(other, PatientProtocol)),
            key=lambda other: (other._is_answered(), other._silent_since),
        )
        self.connections.discard(oldest)  # at once: its end is told only later
        oldest.transport.abort()

    def _is_answered(self) -> bool:
        """Whether a whole question is being answered at this moment."""
        asked = self.cycle is not None and not self.cycle.response_complete
        return asked and self._reading is None


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
