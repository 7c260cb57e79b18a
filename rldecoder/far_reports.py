"""What a stage in another process reports: told there as JSON lines, and said here."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from rldecoder.reporting import Bar, Reporter

_FLUSH_SECONDS = 0.1


class Lines(Protocol):
    """Where lines go: a text stream, for one."""

    def write(self, text: str, /) -> object:
        """Take a line, its end included."""
        ...

    def flush(self) -> object:
        """Hand on what was taken."""
        ...


class FarReporter:
    """A reporter that writes every call as a JSON line.

    Args:
        stream: to the process that shows it; lines are flushed one by one.
    """

    def __init__(self, stream: Lines) -> None:
        self._stream = stream
        self._bars = itertools.count()

    def send(self, event: str, **values: Any) -> None:
        """Write one line."""
        self._stream.write(json.dumps({"event": event, **values}) + "\n")
        self._stream.flush()

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        """A bar that is shown over there."""
        bar = _FarBar(self, next(self._bars))
        self.send(
            "open", bar=bar.number, description=description, total=total, unit=unit, done=done
        )
        try:
            yield bar
        finally:
            bar.flush()
            self.send("close", bar=bar.number)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Pass on; plain floats, for a tensor or NumPy scalar is not JSON."""
        plain = {name: float(value) for name, value in values.items()}
        self.send("metrics", stage=stage, step=step, values=plain)

    def note(self, message: str) -> None:
        """Pass on."""
        self.send("note", message=message)

    def alert(self, message: str) -> None:
        """Pass on."""
        self.send("alert", message=message)


class _FarBar:
    """Adds up small advances: a stage may call it thousands of times a second."""

    def __init__(self, reporter: FarReporter, number: int) -> None:
        self.number = number
        self._reporter = reporter
        self._amount, self._note = 0.0, ""
        self._sent_at = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on; sent at most ten times a second."""
        self._amount += amount
        self._note = note or self._note
        if time.monotonic() - self._sent_at >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered."""
        if self._amount or self._note:
            self._reporter.send("advance", bar=self.number, amount=self._amount, note=self._note)
        self._amount, self._note = 0.0, ""
        self._sent_at = time.monotonic()


class Replay:
    """Says here what was reported there.

    Close it: bars that a killed process never closed are closed then.
    """

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._bars: dict[int, tuple[AbstractContextManager[Bar], Bar]] = {}
        self._left_open = ExitStack()

    def take(self, line: str) -> dict[str, Any] | None:
        """Say what a line of `FarReporter` reports; any other event is returned."""
        event: dict[str, Any] = json.loads(line)
        match event.pop("event"):
            # A bar's block is entered here and left by its number, in any order.
            case "open":
                number = event.pop("bar")
                block = self._report.track(**event)
                self._bars[number] = (block, block.__enter__())
                self._left_open.callback(self._close_bar, number)
            case "advance":
                self._bars[event["bar"]][1].advance(event["amount"], event["note"])
            case "close":
                self._close_bar(event["bar"])

            # What is said in passing.
            case "metrics":
                self._report.metrics(event["stage"], event["step"], event["values"])
            case "note":
                self._report.note(event["message"])
            case "alert":
                self._report.alert(event["message"])
            case other:
                return {"event": other, **event}
        return None

    def close(self) -> None:
        """Close all bars."""
        self._left_open.close()

    def _close_bar(self, number: int) -> None:
        if number in self._bars:
            self._bars.pop(number)[0].__exit__(None, None, None)
