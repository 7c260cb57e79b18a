"""What a stage is given, what it gives back, and its entry in the table of all stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import PHASES, Phase
from rldecoder.config.base import StageConfig
from rldecoder.executors.local import Executor, LocalExecutor
from rldecoder.executors.stage_shards import StageShards
from rldecoder.json_records import Scalar
from rldecoder.reporting import Reporter

if TYPE_CHECKING:
    import torch

FingerprintFunction = Callable[[Any], dict[str, str]]


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
    executor: Executor = field(default_factory=LocalExecutor)
    """Where shards are computed; their bytes are the same everywhere."""

    @property
    def shards(self) -> StageShards:
        """Gives out the stage's work in shards."""
        return StageShards(self.executor, self.progress, self.owner, self.device, self.report)


class Output(NamedTuple):
    """What a stage returns when its files are written."""

    metrics: Mapping[str, Scalar] = {}
    """Headline numbers, kept in the manifest. NaN and infinity must be None."""
    verdict: Literal["pass", "fail"] | None = None
    """Gates only."""
    reasons: tuple[str, ...] = ()
    """Why a gate failed, or what a reader must know; becomes a caveat of what follows."""


@dataclass(frozen=True)
class Stage:
    """A stage's entry in the table of `rldecoder.stages.table`."""

    artifact: type[Artifact]
    """What it publishes; the stage has its name."""
    version: int
    """Raised by hand whenever the same config would now give another result."""
    inputs: type[Any]
    """A NamedTuple of the artifacts that it reads (`rldecoder.stages.inputs`)."""
    fingerprint: FingerprintFunction = field(default=lambda config: {})
    """Hashes of what the stage reads from outside the store (local files, package versions)."""
    gate: bool = False
    """Whether it gives a verdict."""
    in_shards: bool = False
    """Whether all that needs a device is done in shards: where others compute them, this process
    needs none."""

    @property
    def name(self) -> str:
        """As in configs and in the store."""
        return self.artifact.stage

    @property
    def kind(self) -> str:
        """The kind of artifact it publishes."""
        return self.artifact.kind

    @property
    def phase(self) -> Phase:
        """The part of the pipeline that it belongs to."""
        return next(phase for phase, kinds in PHASES.items() if self.artifact in kinds)

    @property
    def module(self) -> str:
        """Its room; what it imports counts as the stage's source."""
        return f"rldecoder.stages.{self.name}"

    @cached_property
    def reads(self) -> dict[str, type[Artifact]]:
        """The artifacts that it reads, by the fields of `inputs`, in order."""
        return get_type_hints(self.inputs)

    @property
    def upstream(self) -> tuple[str, ...]:
        """Names of the stages that it reads from."""
        return tuple(artifact.stage for artifact in self.reads.values())

    def run(self, inputs: Any, config: StageConfig, ctx: StageContext) -> Output:
        """The function `run` of its room, which is imported now."""
        output: Output = import_module(self.module).run(inputs, config, ctx)
        return output
