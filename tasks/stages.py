"""One thin Prefect task a stage: device lease, retries, progress, UI artifacts.

Nothing is cached by Prefect (`NO_CACHE`): the artifact store alone knows what can be reused, for
it verifies the bytes. A stage that was reused ends in a state of that name, so the UI shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.devices import lease_device, require_devices
from rldecoder.errors import DamagedFileError, GateFailedError, NoResourceError, StoreBusyError
from rldecoder.failures import foreseen
from rldecoder.reporting import Reporter, TeeReporter
from rldecoder.runner import StageRun, devices_wanted, run_stage
from rldecoder.stages.context import Stage
from rldecoder.stages.table import STAGES, stage_named
from tasks.pages import show_stage
from tasks.reporter import PrefectReporter
from tasks.stage_process import run_in_process

RETRY_DELAYS_SECONDS = (5.0, 30.0)

_TRANSIENT = (NoResourceError, StoreBusyError)
"""What waiting may mend. `run_stage` has made our own of every OSError."""


class RunContext:
    """What all stages of one run share.

    A plain class on purpose: Prefect looks into the fields of models and dataclasses for results
    of earlier tasks, and would draw false edges from equal constants found there.

    Args:
        store: where artifacts are read from and published to.
        planned: the address of every stage's artifact (`rldecoder.runner.plan`).
        report: reporters beside Prefect's own, such as the terminal's.
    """

    def __init__(
        self,
        run: RunConfig,
        store: ArtifactStore,
        planned: Mapping[str, ArtifactRef],
        report: Reporter,
    ) -> None:
        self.run, self.store, self.planned, self.report = run, store, planned, report
        self._told: set[str] = set()

    def tell_once(self, message: str) -> None:
        """Say it to the user, but not again for every stage."""
        if message not in self._told:
            self._told.add(message)
            self.report.note(message)


def is_transient(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Whether trying again may help: disks, devices and locks, never bad input or a verdict."""
    error = state.result(raise_on_failure=False)
    return isinstance(foreseen(error), _TRANSIENT)


def build(
    stage_name: str, refs: Mapping[str, ArtifactRef], context: RunContext, report: Reporter
) -> StageRun:
    """Run a stage on a leased device, in a process of its own unless it runs on the CPU."""
    run, store = context.run, context.store
    if _is_intact(store, context.planned[stage_name]):
        # Nothing will be computed, so no device is waited for.
        return run_stage(run, stage_name, refs, store=store, report=report, device="cpu")
    # A stage that comes hours later may want more devices than there are.
    for stage in STAGES:
        if devices_wanted(run, stage) > 1 and not store.is_published(context.planned[stage.name]):
            require_devices(run.device, devices_wanted(run, stage))
    count = devices_wanted(run, stage_named(stage_name))
    if not count:
        return run_stage(run, stage_name, refs, store=store, report=report, device="cpu")
    with lease_device(
        run.device,
        count=count,
        timeout_seconds=run.device_timeout_seconds,
        task=f"{run.name}/{stage_name}",
        say=context.tell_once,
    ) as lease:
        if not lease.uuids:
            return run_stage(run, stage_name, refs, store=store, report=report, device="cpu")
        return run_in_process(run, stage_name, refs, store=store, report=report, lease=lease)


def _is_intact(store: ArtifactStore, ref: ArtifactRef) -> bool:
    if not store.is_published(ref):
        return False
    try:
        with store.session():
            store.verify(ref)
    except DamagedFileError:
        return False
    return True


def make_task(stage: Stage) -> Task[..., Any]:
    """The Prefect task of one stage.

    It takes the artifacts that the stage reads (Prefect draws the graph's edges from them) and
    the `RunContext`. Call it with `return_state=True`: the state's name is `Reused` where nothing
    was computed, and its result is a `StageRun`.
    """

    def run_one(refs: dict[str, ArtifactRef], context: RunContext) -> State[Any]:
        here = PrefectReporter(stage.name)
        try:
            result = build(stage.name, refs, context, TeeReporter([context.report, here]))
        except GateFailedError as error:
            ref = context.planned[stage.name]
            if context.store.is_published(ref):  # else it refused to run after an earlier verdict
                here.display(show_stage, stage, ref, context.store)
            return Failed(message=str(error), data=error)
        here.display(show_stage, stage, result.ref, context.store)
        if result.reused:
            was = "was there, built by earlier code" if result.older_code else "was there"
            return Completed(name="Reused", message=f"{result.ref} {was}", data=result)
        return Completed(message=f"{result.ref} in {result.wall_seconds:,.1f} s", data=result)

    return Task(
        run_one,
        name=stage.name,
        description=f"Publishes an artifact of kind {stage.kind} (phase {stage.phase}).",
        task_run_name=stage.name,
        tags={stage.phase},
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=len(RETRY_DELAYS_SECONDS),
        retry_delay_seconds=list(RETRY_DELAYS_SECONDS),
        retry_condition_fn=is_transient,
    )


STAGE_TASKS: Mapping[str, Task[..., Any]] = {stage.name: make_task(stage) for stage in STAGES}
"""The tasks by stage name, in the order of the stages."""
