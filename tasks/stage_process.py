"""Runs a stage in a process of its own, with one leased device in sight and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter

from rldecoder import interrupts
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.devices import DeviceLease
from rldecoder.errors import (
    InterruptedRunError,
    NoResourceError,
    UnexpectedError,
)
from rldecoder.far_failures import Failure
from rldecoder.reporting import Bar, Reporter
from rldecoder.runner import StageRun
from tasks import tied
from tasks.stage_worker import Request

WORKER = (sys.executable, "-m", "tasks.stage_worker")
"""The child's command; tests put their own."""

_ROOT = Path(__file__).resolve().parents[1]
_TAIL_CHARACTERS = 2000


class StageProcessError(UnexpectedError):
    """A stage failed in its process as nobody foresaw; a note holds the traceback."""


def run_in_process(
    run: RunConfig,
    stage_name: str,
    refs: Mapping[str, ArtifactRef],
    *,
    store: ArtifactStore,
    report: Reporter,
    lease: DeviceLease,
) -> StageRun:
    """`rldecoder.runner.run_stage`, in a new process that sees only the leased device.

    The child holds the lease's lock too, so that the device stays taken until it is really gone;
    it dies with this process, and is killed with its whole group when anything is raised here
    (an error, Ctrl-C, a cancellation from the UI).

    Raises:
        RlDecoderError: what the stage raised, with its own class.
        InterruptedRunError: the child was stopped by a signal of its own.
        StageProcessError: any other failure, with the child's traceback as a note.
    """
    reading, writing = os.pipe()
    request = Request(
        run=run,
        stage=stage_name,
        refs=refs,
        place=store.place,
        mirror=store.mirror.url if store.mirror else None,
        device=lease.device,
        events_fd=writing,
    )
    path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if p)

    with (
        open(reading, encoding="utf-8") as events,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as asked,
    ):
        asked.write(request.model_dump_json().encode())
        asked.seek(0)
        try:
            process = tied.start(
                WORKER,
                env={**os.environ, **lease.env, "PYTHONPATH": path},
                pass_fds=[writing, *lease.fds],
                stdin=asked,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        finally:
            os.close(writing)  # else the pipe never ends
        try:
            answer = _relay(events, report)
            process.wait()
        except BaseException:
            tied.stop(process)
            raise
        return _result(answer, stage_name, process.returncode, output)


def _relay(events: Iterable[str], report: Reporter) -> StageRun | Failure | None:
    """Replay the child's reports until it closes the pipe; returns its last word, if any."""
    answer: StageRun | Failure | None = None
    open_bars: dict[int, tuple[AbstractContextManager[Bar], Bar]] = {}
    with ExitStack() as left_open:
        for line in events:
            event = json.loads(line)
            match event.pop("event"):
                # A bar's block is entered here and left by its number, in any order; those that a
                # killed child never closed are closed at the end.
                case "open":
                    number = event.pop("bar")
                    block = report.track(**event)
                    open_bars[number] = (block, block.__enter__())
                    left_open.callback(_close, open_bars, number)
                case "advance":
                    open_bars[event["bar"]][1].advance(event["amount"], event["note"])
                case "close":
                    _close(open_bars, event["bar"])

                # What is said in passing.
                case "metrics":
                    report.metrics(event["stage"], event["step"], event["values"])
                case "note":
                    report.note(event["message"])
                case "alert":
                    report.alert(event["message"])

                # The last word: one of these, or none where the child was killed.
                case "result":
                    answer = TypeAdapter(StageRun).validate_python(event["values"])
                case "error":
                    answer = Failure.model_validate(event)
    return answer


def _close(open_bars: dict[int, tuple[AbstractContextManager[Bar], Bar]], number: int) -> None:
    if number in open_bars:
        open_bars.pop(number)[0].__exit__(None, None, None)


def _result(
    answer: StageRun | Failure | None, stage_name: str, returncode: int, output: IO[bytes]
) -> StageRun:
    if isinstance(answer, StageRun):
        return answer
    if answer is not None:
        raise _rebuilt(stage_name, answer)
    output.seek(0)
    tail = output.read().decode(errors="replace")[-_TAIL_CHARACTERS:].strip()
    if -returncode in (*interrupts.SIGNALS, signal.SIGHUP):
        raise InterruptedRunError(f"The process of {stage_name} was stopped.")
    if returncode == -signal.SIGKILL:
        raise NoResourceError(
            f"The process of {stage_name} was killed.",
            "Most often the system ran out of memory.",
            "Run again: it goes on from its last checkpoint; lower the batch sizes if it recurs.",
        )
    raise _unexpected(
        f"The process of {stage_name} ended without a result (exit status {returncode}).", tail
    )


def _unexpected(what: str, details: str) -> StageProcessError:
    error = StageProcessError(what)
    error.add_note(details)
    return error


def _rebuilt(stage_name: str, failure: Failure) -> Exception:
    """The child's error as an exception of the same class, where that class is known here."""
    known = failure.known()
    return known or _unexpected(f"{stage_name} failed with {failure.message}.", failure.traceback)
