"""The pipeline as a Prefect flow: every stage a task, in order, in one page of the UI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from flows.outcome import NAME, plainly
from flows.parameters import PipelineParameters
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.reporting import Reporter, TeeReporter
from rldecoder.runner import StageRun, plan
from rldecoder.stages.context import Stage
from rldecoder.stages.table import STAGES, stage_named
from rldecoder.tracking import wandb_reporter
from tasks.stages import STAGE_TASKS, RunContext


def run_stages(
    run: RunConfig,
    store: ArtifactStore,
    report: Reporter,
    until: str | None = None,
    on_stage: Callable[[Stage, StageRun], None] | None = None,
) -> list[StageRun]:
    """Run the stage tasks in order, up to and including `until`; call it inside a flow.

    Args:
        report: reporters beside Prefect's own.
        on_stage: called after each stage.

    Raises:
        RlDecoderError: what a stage raised; `GateFailedError` when a gate said no.
    """
    if until is not None:
        stage_named(until)  # refused before any work
    context = RunContext(run, store, plan(run), report)
    refs: dict[str, ArtifactRef] = {}
    results: list[StageRun] = []
    for stage in STAGES:
        read = {name: refs[name] for name in stage.upstream}
        state: Any = STAGE_TASKS[stage.name](read, context, return_state=True)
        result: StageRun = state.result()  # raises what the stage raised
        # The very object that the task returned: Prefect knows the graph's edges by identity.
        refs[stage.name] = result.ref
        results.append(result)
        if on_stage is not None:
            on_stage(stage, result)
        if stage.name == until:
            break
    return results


@flow(name="pipeline", flow_run_name=NAME, persist_result=False)
def pipeline(parameters: PipelineParameters) -> list[StageRun]:
    """Run the pipeline. Finished stages are reused, an interrupted one goes on.

    Args:
        parameters: which run, where it is kept, and how far it goes.
    """
    return plainly(lambda: run_from_parameters(parameters))


def run_from_parameters(parameters: PipelineParameters) -> list[StageRun]:
    """What the flows of deployments share: load, track, run all stages asked for."""
    run, store = parameters.load()
    get_run_logger().info("Run %s, store %s", run.name, store.place)
    with wandb_reporter(run, store.root / "wandb") as tracked:
        reporters: list[Reporter] = [] if tracked is None else [tracked]
        return run_stages(run, store, TeeReporter(reporters), parameters.until)
