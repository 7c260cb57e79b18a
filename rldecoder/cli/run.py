"""The commands that build: `run` and `report`."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rldecoder.artifacts.catalogue import Evaluation, Report, TrainedExplainer
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.cli.progress import RichReporter
from rldecoder.config.run import RunConfig
from rldecoder.devices import lease_device
from rldecoder.errors import BadInputError
from rldecoder.reporting import Reporter, TeeReporter
from rldecoder.runner import StageRun, plan, run_pipeline, run_stage
from rldecoder.stages.context import Stage
from rldecoder.stages.table import STAGES, stage_named
from rldecoder.terminal import Terminal
from rldecoder.tracking import wandb_reporter

SHOWN_EXAMPLES = 3


def run_and_summarise(
    run: RunConfig, store: ArtifactStore, *, until: str | None, prefect: bool
) -> None:
    """Run the pipeline with progress bars, then print targets, report path and examples.

    Raises:
        GateFailedError: a gate with `on_fail: stop` said no; its report is published.
        BadInputError: there is no stage `until`.
    """
    if until is not None:
        stage_named(until)  # refused before any work
    _quiet_libraries()
    terminal = RichReporter()
    console = terminal.console
    console.print(f"[bold]{escape(run.name)}[/bold] {escape(run.description)}", highlight=False)
    console.print(f"  [dim]store {escape(str(store.root))}[/dim]", highlight=False)
    started = time.monotonic()
    with ExitStack() as stack:
        reporters: list[Reporter] = [terminal]
        tracked = stack.enter_context(wandb_reporter(run, store.root / "wandb"))
        if tracked is not None:
            reporters.append(tracked)
        report = TeeReporter(reporters)

        def show(stage: Stage, result: StageRun) -> None:
            _print_stage(console, stage, result)

        if prefect:
            from flows.cli_run import run_with_prefect

            results = run_with_prefect(run, store=store, report=report, until=until, on_stage=show)
        else:
            # One process runs all stages, so one lease covers them all.
            lease = stack.enter_context(
                lease_device(
                    run.device,
                    count=max(run.stage(stage.name).num_devices for stage in STAGES),
                    timeout_seconds=run.device_timeout_seconds,
                    task=run.name,
                    say=report.note,
                )
            )
            os.environ.update(lease.env)  # before CUDA is first used, which reads it once
            results = run_pipeline(
                run, store=store, report=report, until=until, device=lease.device, on_stage=show
            )
    reused = sum(result.reused for result in results)
    console.print(
        f"[bold]done[/bold] in {time.monotonic() - started:,.0f} s: "
        f"{len(results) - reused} stages built, {reused} reused",
        highlight=False,
    )
    refs = {result.ref.stage: result.ref for result in results}
    if "report" in refs:
        print_summary(Terminal(), store, refs)


def rebuild_report(run: RunConfig, store: ArtifactStore) -> None:
    """Build the report of a finished run (or reuse it), then print the summary.

    Raises:
        BadInputError: a stage that the report reads has not been published.
    """
    refs = plan(run)
    missing = [
        s.name for s in STAGES if s.name != "report" and not store.is_published(refs[s.name])
    ]
    if missing:
        raise BadInputError(
            f"The run {run.name} is not finished.",
            f"Missing in {store.root}: {', '.join(missing)}.",
            "Finish it with `rldecoder run CONFIG`, using the same --store and --set.",
        )
    result = run_stage(run, "report", refs, store=store, report=RichReporter())
    refs["report"] = result.ref
    print_summary(Terminal(), store, refs)


def print_summary(console: Console, store: ArtifactStore, refs: dict[str, ArtifactRef]) -> None:
    """Targets with measured values, caveats, example explanations, the report's path."""
    targets = Evaluation.targets.read(store.path(refs[Evaluation.stage]))
    table = Table(title="Targets of the original plan", title_justify="left")
    table.add_column("target")
    table.add_column("goal", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("met")
    marks = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "[yellow]unknown[/yellow]"}
    for row in targets.root:
        value = "-" if row.value is None else f"{row.value:.4g}"
        table.add_row(escape(row.name), escape(row.target), value, marks[row.met])
    console.print(table)
    manifest = store.manifest(refs[Report.stage])
    for caveat in manifest.caveats:
        console.print(f"[yellow]caveat[/yellow] {escape(caveat)}", highlight=False)
    console.print()
    examples = TrainedExplainer.examples.read(store.path(refs[TrainedExplainer.stage])).root
    from rldecoder.explain.explanation import render_explanation  # slow: imports torch

    # Explanations that claim something are worth more of the reader's screen.
    for example in sorted(examples, key=lambda example: not example.claims)[:SHOWN_EXAMPLES]:
        console.print(render_explanation(example))
    page = escape(str(Report.page.path(store.path(refs[Report.stage]))))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _print_stage(console: Console, stage: Stage, result: StageRun) -> None:
    state = "reused" if result.reused else f"{result.wall_seconds:,.1f} s"
    color = "dim" if result.reused else "green"
    verdict = {"pass": "  [green]pass[/green]", "fail": "  [red]fail[/red]"}.get(
        result.verdict or "", ""
    )
    numbers = [
        f"{name} {value:.4g}"
        for name, value in result.metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ][:4]
    console.print(
        f"[{color}]{stage.name:<18}[/{color}] {state:>9}  [dim]{result.ref.digest}[/dim]"
        f"{verdict}  [dim]{escape(', '.join(numbers))}[/dim]",
        highlight=False,
    )


def _quiet_libraries() -> None:
    """Their bars and telemetry would fight with ours; nothing here may phone home."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
