"""What a stage is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rldecoder.config.base import StageConfig
from rldecoder.reporting import Reporter

if TYPE_CHECKING:
    import torch

Scalar = float | int | str | bool | None


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
