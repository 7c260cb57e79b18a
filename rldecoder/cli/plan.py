"""The command `plan`: what a run will take, before anything runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rldecoder.errors import NoResourceError, RlDecoderError
from rldecoder.planning.budget import HERE, RunPlan, StagePlan, plan_run
from rldecoder.planning.throughput import rate_for

if TYPE_CHECKING:
    from rldecoder.run import Run

_STEPS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show_plan(
    run: Run, console: Console, *, device: str | None, share: float | None, as_json: bool
) -> None:
    """Print tokens, FLOPs, hours, disk and memory of every stage.

    Raises:
        BadInputError: the model's sizes are not known, or there is no such device.
        NoResourceError: the disk is too small; the plan is printed all the same.
    """
    plan = _plan(run, device, share)
    if as_json:
        console.out(json.dumps(_as_json(plan), indent=2))
    else:
        _print(plan, console)
    plan.require_disk()


def warn_of_disk(run: Run, console: Console) -> None:
    """One line before a run that its disk may not hold; the run goes on all the same."""
    try:
        # What is there already takes hashes of texts and models to know: asked only in need.
        if _plan(run, None, None, ask_store=False).suffices:
            return
        _plan(run, None, None).require_disk()
    except NoResourceError as error:
        console.print(f"[yellow]{escape(str(error))}[/yellow]")
    except RlDecoderError:
        return  # whatever else is wrong with the run, its own checks say it better


def _plan(run: Run, device: str | None, share: float | None, *, ask_store: bool = True) -> RunPlan:
    settings = run.config.sync_tokenizer
    rate = rate_for(settings.repo or settings.path or settings.model, device, share)
    # Digests need the model's hash: a plan is also for runs whose model is not here yet.
    refs, why = None, None
    if ask_store:
        try:
            refs = run.refs
        except RlDecoderError as error:
            why = str(error)
    return plan_run(run.config, run.store, refs, rate, why)


def _as_json(plan: RunPlan) -> dict[str, object]:
    totals = {
        "tokens": plan.tokens, "flops": plan.flops, "hours": plan.hours,
        "disk_bytes": plan.disk_bytes, "memory_bytes": plan.memory_bytes,
        "disk_suffices": plan.suffices,
    }  # fmt: skip
    return {**plan.model_dump(mode="json"), "to_do": totals}


def _print(plan: RunPlan, console: Console) -> None:
    table = Table(
        title=escape(f"{plan.name}: what it will take"),
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("stage", no_wrap=True)
    for column in ("tokens", "FLOPs", "hours", "disk", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("store", no_wrap=True)
    for row in plan.stages:
        table.add_row(*_cells(row), style="dim" if row.state == HERE else None)
    table.add_section()
    table.add_row(
        "to do, in all", _short(plan.tokens), _short(plan.flops), _hours(plan.hours),
        _bytes(plan.disk_bytes), _bytes(plan.memory_bytes), f"{len(plan.to_do)} stages",
    )  # fmt: skip
    console.print(table)

    hours = (
        f"Hours are FLOPs over {escape(plan.rate)}. They leave out data, overheads and small "
        "products: a lower bound."
        if plan.rate
        else "Hours are not known: `rldecoder smoke MODEL` measures this machine's speed."
    )
    console.print(hours)
    console.print(
        f"Disk: {_bytes(plan.free_bytes)} free in {escape(plan.store)}; with the largest stage's "
        "checkpoints. Memory: of the largest stage."
    )
    if plan.why_unknown is not None:
        console.print(
            f"[yellow]What is in the store cannot be known yet.[/yellow] {escape(plan.why_unknown)}"
        )


def _cells(row: StagePlan) -> tuple[str, ...]:
    return (
        row.stage, _short(row.tokens), _short(row.flops), _hours(row.hours),
        _bytes(row.disk_bytes + row.scratch_bytes), _bytes(row.memory_bytes), row.state,
    )  # fmt: skip


def _short(value: float) -> str:
    for size, unit in _STEPS:
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}" if value else "-"


def _bytes(count: float) -> str:
    return f"{_short(count)}B" if count else "-"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "?"
    if hours >= 100:
        return f"{hours:,.0f}"
    return f"{hours:.2g}" if hours >= 0.01 else ("<0.01" if hours else "-")
