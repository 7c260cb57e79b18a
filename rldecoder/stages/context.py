"""What a stage is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from rldecoder.config.base import StageConfig

if TYPE_CHECKING:
    import torch

Scalar = float | int | str | bool | None


class Bar(Protocol):
    """One progress bar."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on by `amount` units; `note` is a short text shown beside the bar."""
        ...


class Reporter(Protocol):
    """Where a stage's progress, metrics and messages go (terminal, Prefect, wandb, nowhere)."""

    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> AbstractContextManager[Bar]:
        """Show a progress bar; `done` is what an earlier, interrupted run had finished."""
        ...

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Live metrics at a step (wandb, Prefect). Curves on disk are the stage's own work."""
        ...

    def note(self, message: str) -> None:
        """One line for the user."""
        ...

    def alert(self, message: str) -> None:
        """Something drifts (NaN, dead latents, collapse): shown, logged, raised to Prefect."""
        ...


class SilentBar:
    """A bar that shows nothing."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Do nothing."""


class SilentReporter:
    """A reporter for tests and for library use; it keeps alerts so that tests can read them."""

    def __init__(self) -> None:
        self.alerts: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        """A bar that shows nothing."""
        yield SilentBar()

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Drop them."""

    def note(self, message: str) -> None:
        """Keep the message."""
        self.notes.append(message)

    def alert(self, message: str) -> None:
        """Keep the message."""
        self.alerts.append(message)


@dataclass(frozen=True)
class InputArtifact:
    """A published, verified artifact, as a stage sees it."""

    kind: str
    stage: str
    digest: str
    path: Path
    """The folder with its files. Read only."""
    metrics: Mapping[str, Scalar]
    config: Mapping[str, Any]
    """The stage config that built it, as plain values."""
    verdict: str | None = None
    """`pass` or `fail` for gates, None for all else."""
    caveats: tuple[str, ...] = ()
    """What readers of anything built on this must be told (failed gates upstream, ...)."""
    wall_seconds: float = 0.0


@dataclass(frozen=True)
class StageContext:
    """What a stage may use beside its inputs and its config."""

    out: Path
    """An empty folder; what is written here is published when `run` returns."""
    progress: Path
    """A folder that outlives a killed run: checkpoints go here, and only there."""
    seed: int
    """The stage's own seed, derived from the run's."""
    device: torch.device
    report: Reporter
    caveats: tuple[str, ...] = ()
    """The caveats of all inputs, for stages that print results."""
    owner: str = ""
    """Whose progress it is (stage and digest): another's checkpoints are not taken up."""


class StageOutput(NamedTuple):
    """What a stage returns when its files are written."""

    metrics: dict[str, Scalar] = {}  # noqa: RUF012  (a NamedTuple default, never mutated)
    """Headline numbers, kept in the manifest. NaN and infinity must be None."""
    verdict: Literal["pass", "fail"] | None = None
    """Gates only."""
    reasons: tuple[str, ...] = ()
    """Why a gate failed, or what a reader must know; becomes a caveat of what follows."""


RunFunction = Callable[[Mapping[str, InputArtifact], Any, StageContext], StageOutput]
FingerprintFunction = Callable[[Any], dict[str, str]]
Phase = Literal["prepare", "features", "decoder", "rl", "interpretation", "explanations"]


def no_fingerprint(config: StageConfig) -> dict[str, str]:
    """For stages that read nothing from outside the store."""
    return {}


@dataclass(frozen=True)
class Stage:
    """A stage's entry in the table of `rldecoder.stages.table`."""

    name: str
    kind: str
    """The kind of artifact it publishes."""
    version: int
    """Raised by hand whenever the same config would now give another result."""
    inputs: tuple[str, ...]
    """Names of the stages whose artifacts it reads; also the keys of `inputs` in `run`."""
    run: RunFunction
    phase: Phase
    gate: bool = False
    fingerprint: FingerprintFunction = field(default=no_fingerprint)
    """Hashes of what the stage reads from outside the store (local files, package versions)."""
