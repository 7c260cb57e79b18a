"""Progress, metrics and alerts of a stage, as the Prefect UI shows them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.events import emit_event
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from rldecoder.reporting import Bar, SilentBar
from rldecoder.stages.table import STAGES
from rldecoder.terminal import printable

DRIFT_EVENT = "rldecoder.drift"
"""Emitted for every alert; automations can be bound to it."""

_UPDATE_SECONDS = 3.0
_METRICS_SECONDS = 10.0


def artifact_key(text: str) -> str:
    """A Prefect artifact key: lowercase letters, digits and dashes."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def stage_key(stage_name: str, *more: str) -> str:
    """The key of a stage's artifact: its place in the pipeline comes first, so lists sort by it."""
    names = [stage.name for stage in STAGES]
    place = [f"{names.index(stage_name) + 1:02d}"] if stage_name in names else []
    return artifact_key(" ".join([*place, stage_name, *more]))


class PrefectReporter:
    """A `Reporter` for use inside a Prefect task.

    A server that does not answer costs the UI its display, never the stage its work (`display`).

    Args:
        stage: the stage's name; the artifacts' key.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._logger: Any = get_run_logger()
        self._metrics_at = -_METRICS_SECONDS
        self._server_answers = True

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        """A progress artifact, made once the bar has been open for some seconds."""
        if not total:
            yield SilentBar()
            return
        bar = _ArtifactBar(self, description, total, unit, done)
        try:
            yield bar
        finally:
            bar.close()

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One log line, at most every ten seconds: curves belong to wandb and Parquet."""
        now = time.monotonic()
        if now - self._metrics_at >= _METRICS_SECONDS:
            self._metrics_at = now
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._logger.info("%s step %d: %s", stage, step, numbers)

    def note(self, message: str) -> None:
        """One line in the run's log."""
        self._logger.info("%s", printable(message))

    def alert(self, message: str) -> None:
        """A warning in the log and an event that automations can act on."""
        self._logger.warning("%s", printable(message))
        emit_event(
            DRIFT_EVENT,
            resource={
                "prefect.resource.id": f"rldecoder.stage.{self.stage}",
                "prefect.resource.name": self.stage,
            },
            payload={"message": message},
        )

    def display(self, show: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call something that writes to the UI; None when the server is silent.

        The first failed call is logged, and no further one is made.
        """
        if not self._server_answers:
            return None
        try:
            return show(*arguments, **named)
        except (httpx.HTTPError, PrefectException, ConnectionError) as error:
            self._server_answers = False
            self._logger.warning("The UI is no longer updated: %s", error)
            return None


class _ArtifactBar:
    def __init__(
        self, reporter: PrefectReporter, description: str, total: float, unit: str, done: float
    ) -> None:
        self._reporter, self._description, self._unit = reporter, description, unit
        self._total, self._first, self._done = total, done, done
        self._note = ""
        self._artifact: UUID | None = None
        self._opened_at = self._shown_at = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on; shown at most every few seconds, for each time is a call to the server."""
        self._done += amount
        self._note = note or self._note
        if time.monotonic() - self._shown_at >= _UPDATE_SECONDS:
            self._show()

    def close(self) -> None:
        """Leave the last state; a bar too short to be seen leaves nothing."""
        if self._artifact is not None:
            self._show()

    def _show(self) -> None:
        now = time.monotonic()
        speed = (self._done - self._first) / max(now - self._opened_at, 1e-9)
        text = (
            f"{self._description}: {self._done:,.0f} of {self._total:,.0f} {self._unit}, "
            f"{speed:,.1f} {self._unit}/s. {self._note}"
        )
        percent = min(100.0, 100.0 * self._done / self._total)
        if self._artifact is None:
            key = stage_key(self._reporter.stage, "progress")
            self._artifact = self._reporter.display(
                create_progress_artifact, percent, key=key, description=text.strip()
            )
        else:
            self._reporter.display(
                update_progress_artifact, self._artifact, percent, description=text.strip()
            )
        self._shown_at = time.monotonic()
