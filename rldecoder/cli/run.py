"""The commands that build: `run` and `report`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import entry_points

from rich.console import Console
from rich.markup import escape

from rldecoder.artifacts.catalogue import Report
from rldecoder.cli.clock import RunClock, expected_of, heartbeat
from rldecoder.cli.ending import Typed, print_summary
from rldecoder.cli.plan import warn_of_disk
from rldecoder.cli.progress import RichReporter
from rldecoder.devices import lease_device
from rldecoder.errors import BadInputError
from rldecoder.reporting import Reporter, TeeReporter
from rldecoder.run import Run
from rldecoder.runner import StageRun, devices_wanted, run_pipeline, run_stage
from rldecoder.stages.context import Stage
from rldecoder.stages.table import STAGES, stage_named
from rldecoder.terminal import Terminal
from rldecoder.tracking import wandb_reporter


def run_and_summarise(run: Run, typed: Typed, *, until: str | None, prefect: bool) -> None:
    """Run the pipeline with progress bars, then say what was built (`rldecoder.cli.ending`).

    Args:
        run: a config and its store.
        until: the last stage to build; None: all.
        prefect: as a Prefect flow, or plainly.

    Raises:
        GateFailedError: a gate with `on_fail: stop` said no; its report is published.
        BadInputError: there is no stage `until`, or no Prefect runner is installed.
    """
    if until is not None:
        stage_named(until)  # refused before any work
    through_prefect = prefect_runner() if prefect else None
    _quiet_libraries()
    config, store = run.config, run.store
    terminal = RichReporter()
    console = terminal.console
    console.print(f"[bold]{escape(config.name)}[/bold] {escape(config.description)}")
    console.print(f"  [dim]store {escape(store.place)}[/dim]")

    warn_of_disk(run, console)
    started = time.monotonic()
    with ExitStack() as stack:
        reporters: list[Reporter] = [terminal]
        tracked = stack.enter_context(wandb_reporter(config, store.root / "wandb"))
        if tracked is not None:
            reporters.append(tracked)
        report = TeeReporter(reporters)

        clock = terminal.clock = RunClock(expected_of(run, until))
        stack.enter_context(heartbeat(console, clock))

        def show(stage: Stage, result: StageRun) -> None:
            clock.done(stage.name)
            _print_stage(console, stage, result)

        if through_prefect is not None:
            results = through_prefect(
                config, store=store, report=report, until=until, on_stage=show
            )
        else:
            # One process runs all stages, so one lease covers them all.
            lease = stack.enter_context(
                lease_device(
                    config.device,
                    count=max(devices_wanted(config, stage) for stage in STAGES),
                    timeout_seconds=config.device_timeout_seconds,
                    task=config.name,
                    say=report.note,
                )
            )
            os.environ.update(lease.env)  # before CUDA is first used, which reads it once
            results = run_pipeline(
                config, store=store, report=report, until=until, device=lease.device, on_stage=show
            )

    reused = sum(result.reused for result in results)
    console.print(
        f"[bold]done[/bold] in {time.monotonic() - started:,.0f} s: "
        f"{len(results) - reused} stages built, {reused} reused"
    )
    if any(result.older_code for result in results):
        console.print(
            "[dim]* built by earlier code of the stage. Where the change alters results, raise the "
            "stage's version.[/dim]"
        )
    refs = {result.ref.stage: result.ref for result in results}
    if Report.stage in refs:
        print_summary(Terminal(), Run(config, store, refs=refs), typed)


def prefect_runner() -> Callable[..., list[StageRun]]:
    """What runs the pipeline as a Prefect flow: `rldecoder` does not know the package of flows.

    It is called as `run_pipeline` is, without a device.

    Raises:
        BadInputError: no installed package offers one.
    """
    for entry in entry_points(group="rldecoder.runners", name="prefect"):
        try:
            runner: Callable[..., list[StageRun]] = entry.load()
        except ImportError as error:
            raise BadInputError(
                "The Prefect runner cannot be loaded.",
                f"{entry.value}: {error}.",
                "Install the project again (`pip install -e .`), or run with --no-prefect.",
            ) from error
        return runner
    raise BadInputError(
        "There is no Prefect runner.",
        "No installed package offers an entry point `prefect` in the group `rldecoder.runners`: "
        "the package of flows is not installed, or was before there were such entry points.",
        "Install the project again (`pip install -e .`), or run with --no-prefect.",
    )


def rebuild_report(run: Run, typed: Typed) -> None:
    """Build the report of a finished run (or reuse it), then print the summary.

    Args:
        run: a config and its store.

    Raises:
        BadInputError: a stage that the report reads has not been published.
    """
    run.require(stage_named(Report.stage).upstream, "to report on it")
    run_stage(run.config, Report.stage, run.refs, store=run.store, report=RichReporter())
    print_summary(Terminal(), run, typed)


def _print_stage(console: Console, stage: Stage, result: StageRun) -> None:
    reused = "reused*" if result.older_code else "reused"
    state = reused if result.reused else f"{result.wall_seconds:,.1f} s"
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
        f"{verdict}  [dim]{escape(', '.join(numbers))}[/dim]"
    )


def _quiet_libraries() -> None:
    """Their bars and telemetry would fight with ours; nothing here may phone home."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
