"""Runs one stage in this process and reports on a pipe: the child of `tasks.stage_process`.

The request is one JSON object on stdin, the answers are JSON lines on the descriptor that the
request names. Results are references, never data: artifacts travel through the store.
"""

from __future__ import annotations

import sys

from pydantic import BaseModel

from rldecoder.artifacts.opening import open_store
from rldecoder.artifacts.store import ArtifactRef
from rldecoder.config.run import RunConfig
from rldecoder.entry import guarded
from rldecoder.errors import EXIT_DONE, EXIT_UNEXPECTED, InterruptedRunError
from rldecoder.failures import foreseen
from rldecoder.far_failures import Failure
from rldecoder.far_reports import FarReporter
from rldecoder.runner import run_stage


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


def work(request: Request, reporter: FarReporter) -> int:
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
    except Exception as error:  # whatever it is, the parent hears of it
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
        reporter = FarReporter(stream)
        try:
            return work(request, reporter)
        except KeyboardInterrupt:
            failure = Failure.of(InterruptedRunError("The stage was interrupted."))
            reporter.send("error", **failure.model_dump())
            raise


if __name__ == "__main__":
    sys.exit(guarded(main))
