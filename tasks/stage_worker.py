"""Runs one stage in this process and reports on a pipe: the child of `tasks.stage_process`.

The request is one JSON object on stdin, the answers are JSON lines on the descriptor that the
request names. Results are references, never data: artifacts travel through the store.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from pydantic import BaseModel

from rldecoder.artifacts.opening import open_store
from rldecoder.artifacts.store import ArtifactRef
from rldecoder.config.run import RunConfig
from rldecoder.entry import guarded
from rldecoder.errors import EXIT_DONE, EXIT_UNEXPECTED, InterruptedRunError
from rldecoder.failures import foreseen
from rldecoder.far_failures import Failure
from rldecoder.reporting import Bar
from rldecoder.runner import run_stage

_FLUSH_SECONDS = 0.1


class PipeReporter:
    """A reporter that writes every call as a JSON line.

    Args:
        stream: text stream to the parent; lines are flushed one by one.
    """

    def __init__(self, stream: IO[str]) -> None:
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
        """A bar that is shown by the parent."""
        bar = _PipeBar(self, next(self._bars))
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


class _PipeBar:
    """Adds up small advances: a stage may call it thousands of times a second."""

    def __init__(self, reporter: PipeReporter, number: int) -> None:
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


class Request(BaseModel):
    """What the parent asks for."""

    run: RunConfig
    stage: str
    refs: dict[str, ArtifactRef]
    """Of the stage's inputs, by stage."""
    place: str
    """The store's folder or bucket."""
    mirror: str | None
    """Its address with the password in it, which configs do not tell."""
    device: str
    events_fd: int
    """The descriptor to answer on."""


def work(request: Request, reporter: PipeReporter) -> int:
    """Run the requested stage and send its result, or its error; the exit code says which."""
    try:
        result = run_stage(
            request.run,
            request.stage,
            request.refs,
            store=open_store(request.place, request.mirror, request.run.s3),
            report=reporter,
            device=request.device,
        )
    except Exception as error:
        known = foreseen(error)
        reporter.send("error", **Failure.of(error).model_dump())
        return EXIT_UNEXPECTED if known is None else known.exit_code
    values = result._asdict() | {"ref": result.ref.model_dump()}
    reporter.send("result", values=values)
    return EXIT_DONE


def main() -> int:
    """Read the request, work, answer; an interruption (of this process alone) is an answer, too."""
    request = Request.model_validate_json(sys.stdin.read())
    with open(request.events_fd, "w", encoding="utf-8") as stream:
        reporter = PipeReporter(stream)
        try:
            return work(request, reporter)
        except KeyboardInterrupt:
            failure = Failure.of(InterruptedRunError("The stage was interrupted."))
            reporter.send("error", **failure.model_dump())
            raise


if __name__ == "__main__":
    sys.exit(guarded(main))
