"""The plan of a run: every stage's cost, what is there already, and whether the disk suffices."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.base import Config
from rldecoder.config.run import RunConfig
from rldecoder.errors import NoResourceError
from rldecoder.planning.costs import stage_cost
from rldecoder.planning.sizes import ModelSizes, model_sizes
from rldecoder.planning.sizing import Sizing
from rldecoder.planning.throughput import Rate
from rldecoder.stages.table import STAGES

HERE, STARTED, TO_DO, UNKNOWN = "here", "started", "to do", "unknown"


class StagePlan(Config):
    """One stage's row."""

    stage: str
    state: str
    """`here`, `started`, `to do`, or `unknown` where its address cannot be known yet."""
    tokens: int
    flops: float
    hours: float | None
    """At the rate of the plan; None where there is none."""
    disk_bytes: int
    scratch_bytes: int
    memory_bytes: int


class RunPlan(Config):
    """All stages, and what is still to come in all."""

    name: str
    rate: str | None
    """What the hours are computed from."""
    flops_per_second: float | None
    store: str
    free_bytes: int
    """On the disk of the store."""
    why_unknown: str | None
    """Why the store could not be asked."""
    stages: tuple[StagePlan, ...]

    @property
    def to_do(self) -> tuple[StagePlan, ...]:
        """The stages that are still to be built."""
        return tuple(row for row in self.stages if row.state != HERE)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the disk must still take: what is kept, and the largest scratch beside it."""
        scratch = max((row.scratch_bytes for row in self.to_do), default=0)
        return sum(row.disk_bytes for row in self.to_do) + scratch

    @property
    def tokens(self) -> int:
        """Of the stages to come."""
        return sum(row.tokens for row in self.to_do)

    @property
    def flops(self) -> float:
        """Of the stages to come."""
        return sum(row.flops for row in self.to_do)

    @property
    def hours(self) -> float | None:
        """Of the stages to come, one after the other."""
        hours = [row.hours for row in self.to_do if row.hours is not None]
        return sum(hours) if len(hours) == len(self.to_do) else None

    @property
    def memory_bytes(self) -> int:
        """Of the largest stage to come."""
        return max((row.memory_bytes for row in self.to_do), default=0)

    @property
    def largest(self) -> StagePlan | None:
        """The stage to come that takes most of the disk."""
        return max(self.to_do, key=lambda row: row.disk_bytes + row.scratch_bytes, default=None)

    @property
    def suffices(self) -> bool:
        """Whether the disk holds what is to come."""
        return self.disk_bytes <= self.free_bytes

    def require_disk(self) -> None:
        """Refuse a run that its disk cannot hold.

        Raises:
            NoResourceError: fewer bytes are free than are to be written.
        """
        if self.suffices or self.largest is None:
            return
        most = self.largest
        raise NoResourceError(
            f"The disk of {self.store} is too small for the run {self.name}.",
            f"It still writes about {_gb(self.disk_bytes)}, of which {most.stage} is "
            f"{_gb(most.disk_bytes + most.scratch_bytes)}, and {_gb(self.free_bytes)} are free.",
            "Choose a larger disk (--store), lower `cache_activations.budget_tokens` with "
            "`train_sae.source: stream`, or free some space.",
        )


def plan_run(
    run: RunConfig,
    store: ArtifactStore,
    refs: Mapping[str, ArtifactRef] | None,
    rate: Rate | None,
    why_unknown: str | None = None,
    sizes: ModelSizes | None = None,
) -> RunPlan:
    """What every stage of a run takes.

    Args:
        store: asked what is there; its disk is asked what is free.
        refs: addresses of the artifacts; None where they cannot be known.
        rate: to compute hours from; None leaves them out.
        why_unknown: the reason where `refs` is None.
        sizes: of the model, where they are known already.

    Raises:
        BadInputError: the sizes of the model are not known.
    """
    sizing = Sizing(run, sizes or model_sizes(run.sync_tokenizer))
    rows = []

    # A row a stage, also of those that are there: who reads the plan sees what they took.
    for stage in STAGES:
        cost = stage_cost(stage.name, sizing)
        rows.append(
            StagePlan(
                stage=stage.name,
                state=UNKNOWN if refs is None else _state(store, refs[stage.name]),
                tokens=cost.tokens,
                flops=cost.flops,
                hours=None if rate is None else cost.flops / rate.flops_per_second / 3600,
                disk_bytes=cost.disk_bytes,
                scratch_bytes=cost.scratch_bytes,
                memory_bytes=cost.memory_bytes,
            )
        )

    # What is free counts where it is written: a bucket's store writes its copies first.
    there = next(place for place in (store.root, *store.root.parents) if place.exists())
    return RunPlan(
        name=run.name,
        rate=None if rate is None else rate.said,
        flops_per_second=None if rate is None else rate.flops_per_second,
        store=store.place,
        free_bytes=shutil.disk_usage(there).free,
        why_unknown=why_unknown,
        stages=tuple(rows),
    )


def _state(store: ArtifactStore, ref: ArtifactRef) -> str:
    if store.is_published(ref):
        return HERE
    progress = store.progress_path(ref)
    return STARTED if progress.is_dir() and any(progress.iterdir()) else TO_DO


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
