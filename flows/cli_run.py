"""`rldecoder run` as a Prefect flow: the same stages and results as `run_pipeline`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from flows.local_server import offline_settings, prefect_home, server_for_one_run
from rldecoder import interrupts
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.reporting import Reporter
from rldecoder.runner import StageRun
from rldecoder.stages.context import Stage

_DRAIN_SECONDS = 15.0


def run_with_prefect(
    run: RunConfig,
    *,
    store: ArtifactStore,
    report: Reporter,
    until: str | None = None,
    on_stage: Callable[[Stage, StageRun], None] | None = None,
) -> list[StageRun]:
    """Run the pipeline as a flow on a running Prefect server, or on one of our own.

    Raises what `rldecoder.runner.run_pipeline` raises. A server that was started here is gone
    when this returns, and also when this process is killed.
    """
    home = prefect_home()
    for name, value in {
        **offline_settings(home),
        # The terminal belongs to the progress bars; the UI and the API keep the whole log.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }.items():
        os.environ.setdefault(name, value)

    def import_prefect() -> None:
        importlib.import_module("flows.pipeline")

    with server_for_one_run(home, import_prefect) as server:
        # Only now: Prefect reads its settings when it is first imported.
        from prefect import flow
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        from flows.pipeline import run_stages

        name = "-".join([run.name, *([f"until-{until}"] if until else []), "from-terminal"])

        @flow(name="pipeline", flow_run_name=name, persist_result=False, validate_parameters=False)
        def from_command_line(run: RunConfig, until: str | None) -> list[StageRun]:
            """The pipeline, started by `rldecoder run`."""
            # Prefect has put its own for SIGTERM, whose exception may be dropped for good.
            interrupts.handle_signals()
            return run_stages(run, store, report, until, on_stage)

        settings: dict[Any, Any] = {PREFECT_API_URL: server.url}
        if server.password is not None:
            settings[PREFECT_API_AUTH_STRING] = server.password
        with temporary_settings(updates=settings):
            try:
                return from_command_line(run, until)
            finally:
                _send_what_is_left()


def _send_what_is_left() -> None:
    """Events (states of task runs among them) and logs go out in the background: before the
    server is stopped, wait for them."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=_DRAIN_SECONDS)
    APILogWorker.drain_all(timeout=_DRAIN_SECONDS)
