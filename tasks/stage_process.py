"""Runs a stage in a process of its own, with one leased device in sight and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter

from rldecoder import interrupts
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.devices import DeviceLease
from rldecoder.errors import InterruptedRunError, NoResourceError, UnexpectedError
from rldecoder.far_failures import Failure
from rldecoder.far_reports import Replay
from rldecoder.reporting import Reporter
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
    with closing(Replay(report)) as replay:
        for line in events:
            word = replay.take(line)
            # One of these, or none where the child was killed.
            if word is None:
                continue
            match word.pop("event"):
                case "result":
                    answer = TypeAdapter(StageRun).validate_python(word["values"])
                case "error":
                    answer = Failure.model_validate(word)
    return answer


def _result(
    answer: StageRun | Failure | None, stage_name: str, returncode: int, output: IO[bytes]
) -> StageRun:
    if isinstance(answer, StageRun):
        return answer
    if answer is not None:
        # The child's error as an exception of the same class, where that class is known here.
        raise answer.known() or _unexpected(
            f"{stage_name} failed with {answer.message}.", answer.traceback
        )
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
