"""The commands that only look: status, explain, smoke, models, devices."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rldecoder.artifacts import ArtifactRef, ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError, DamagedFileError

EXPLAIN_NEEDS = (
    "sync_tokenizer", "train_sae", "freeze_decoder", "label_features", "train_explainer",
)  # fmt: skip


def show_status(run: RunConfig, store: ArtifactStore, console: Console) -> None:
    """One row a stage: its address and what is there."""
    from rldecoder.runner import plan  # slow: imports every stage
    from rldecoder.stages.table import STAGES

    refs = plan(run)
    table = Table(title=f"{run.name} in {store.root}", title_justify="left")
    for column in ("stage", "digest", "state", "wall", "device"):
        table.add_column(column, justify="right" if column == "wall" else "left")
    for stage in STAGES:
        ref = refs[stage.name]
        state, wall, device = _state(store, ref)
        table.add_row(stage.name, ref.digest, state, wall, device)
    console.print(table)


def _state(store: ArtifactStore, ref: ArtifactRef) -> tuple[str, str, str]:
    if not store.is_published(ref):
        progress = store.progress_path(ref)
        if progress.is_dir() and any(progress.iterdir()):
            return "[yellow]interrupted, resumable[/yellow]", "", ""
        return "[dim]missing[/dim]", "", ""
    try:
        manifest = store.verify(ref)
    except DamagedFileError:
        return "[red]damaged, will be rebuilt[/red]", "", ""
    state = "[green]published[/green]"
    if manifest.verdict == "fail":
        state = "[red]published, gate failed[/red]"
    elif manifest.caveats:
        state = "[yellow]published, with caveats[/yellow]"
    return state, f"{manifest.wall_seconds:,.1f} s", manifest.device


def show_explanation(run: RunConfig, store: ArtifactStore, prompt: str, console: Console) -> None:
    """Explain one prompt with the published decoder.

    Raises:
        BadInputError: the prompt is empty, or the run has not come so far.
    """
    if not prompt.strip():
        raise BadInputError("The prompt is empty.", "", 'Example: rldecoder explain CONFIG "The"')
    from rldecoder.runner import plan, read_input

    refs = plan(run)
    missing = [name for name in EXPLAIN_NEEDS if not store.is_published(refs[name])]
    if missing:
        raise BadInputError(
            "There is nothing to explain with yet.",
            f"Missing in {store.root}: {', '.join(missing)}.",
            "Finish the run with `rldecoder run CONFIG`, using the same --store and --set.",
        )
    from rldecoder.explain.session import load_session, render_explanation

    inputs = {name: read_input(store, refs[name]).path for name in EXPLAIN_NEEDS}
    session = load_session(
        model=inputs["sync_tokenizer"] / "model",
        sae=inputs["train_sae"] / "sae",
        decoder=inputs["freeze_decoder"] / "decoder",
        labels=inputs["label_features"] / "feature_labels.json",
        explainer=inputs["train_explainer"],
    )
    console.print(render_explanation(session.explain(prompt)))
    for caveat in read_input(store, refs["train_explainer"]).caveats:
        console.print(f"[yellow]caveat[/yellow] {escape(caveat)}", highlight=False)


def show_smoke(model: str, console: Console) -> None:
    """Throughput, shapes and memory of a frozen model."""
    from rldecoder.lm.smoke import smoke_test

    result = smoke_test(model, note=console.print)
    table = Table(title=f"smoke test of {model}", title_justify="left", show_header=False)
    for name, value in result.rows():
        table.add_row(escape(name), escape(value))
    console.print(table)


def show_models(console: Console) -> None:
    """The model specs and whether their weights are here."""
    from rldecoder.lm.registry import list_models

    table = Table(title="base models", title_justify="left")
    table.add_column("name", no_wrap=True)
    for column in ("parameters", "layers", "d_model", "hook layer", "licence", "weights"):
        table.add_column(column)
    for row in list_models():
        table.add_row(*(escape(str(value)) for value in row))
    console.print(table)


def show_devices(console: Console) -> None:
    """Accelerators by NVML, with leases."""
    from rldecoder.devices import device_rows

    table = Table(title="devices", title_justify="left")
    for column in ("device", "name", "memory free", "utilisation", "state"):
        table.add_column(column)
    for row in device_rows():
        table.add_row(*(escape(str(value)) for value in row))
    console.print(table)
