"""The commands that only look: status, explain, smoke, models, devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rldecoder.artifacts.catalogue import TrainedExplainer
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.errors import BadInputError, DamagedFileError

if TYPE_CHECKING:
    from rldecoder.opened import Opened
    from rldecoder.run import Run


def show_status(run: Run, console: Console) -> None:
    """One row a stage: its address and what is there."""
    table = Table(title=escape(f"{run.config.name} in {run.store.place}"), title_justify="left")
    for column in ("stage", "digest", "state", "wall", "device"):
        table.add_column(column, justify="right" if column == "wall" else "left")
    for name, ref in run.refs.items():
        table.add_row(name, ref.digest, *_state(run.store, ref))
    console.print(table)


def _state(store: ArtifactStore, ref: ArtifactRef) -> tuple[str, str, str]:
    if not store.is_published(ref):
        progress = store.progress_path(ref)
        if progress.is_dir() and any(progress.iterdir()):
            return "[yellow]interrupted, resumable[/yellow]", "", ""
        return "[dim]missing[/dim]", "", ""
    try:
        manifest = store.looked_at(ref)
    except DamagedFileError:
        return "[red]damaged, will be rebuilt[/red]", "", ""
    state = "[green]published[/green]"
    if manifest.verdict == "fail":
        state = "[red]published, gate failed[/red]"
    elif manifest.caveats:
        state = "[yellow]published, with caveats[/yellow]"
    return state, f"{manifest.wall_seconds:,.1f} s", escape(manifest.device)


def show_explanation(
    run: Opened,
    prompt: str,
    console: Console,
    *,
    as_json: bool = False,
    html: Path | None = None,
) -> None:
    """Explain one prompt with the published decoder.

    Args:
        as_json: print one JSON object (ASCII, so that no terminal acts on it) and nothing else.
        html: write a self-contained page there, too.

    Raises:
        BadInputError: the prompt is empty, the run has not come so far, or the page cannot be
            written.
    """
    if not prompt.strip():
        raise BadInputError("The prompt is empty.", "", 'Example: rldecoder explain CONFIG "The"')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that the locale cannot read
        raise BadInputError(
            "The prompt is not valid Unicode.",
            f"Character {error.start + 1} is none.",
            "Write the prompt as UTF-8.",
        ) from error
    from rldecoder.opened import EXPLAINING

    run.require(EXPLAINING, "to explain")
    artifacts = {kind.stage: run.artifact(kind) for kind in EXPLAINING}
    caveats = run.artifact(TrainedExplainer).caveats

    from rldecoder.dashboard.explanation import explanation_page
    from rldecoder.explain.explanation import render_explanation

    explanation = run.reader().explain(prompt)
    if html is not None:
        try:
            page = explanation_page(explanation, run.name, caveats)
            html.write_text(page, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise BadInputError(
                f"The page {html} cannot be written.", str(error), "Give another path to --html."
            ) from error
    if as_json:
        digests = {name: artifact.digest for name, artifact in artifacts.items()}
        value = {
            "run": run.name, "artifacts": digests, "caveats": list(caveats),
            **explanation.to_json(),
        }  # fmt: skip
        console.out(json.dumps(value, indent=2), highlight=False)
        return
    console.print(render_explanation(explanation))
    for caveat in caveats:
        console.print(f"[yellow]caveat[/yellow] {escape(caveat)}", highlight=False)
    if html is not None:
        console.print(f"page: {escape(str(html))}", highlight=False, soft_wrap=True)


def show_smoke(model: str, console: Console, device: str = "cpu") -> None:
    """Throughput, shapes and memory of a frozen model; plans of runs start from it.

    Args:
        device: `cpu` or `cuda`.
    """
    import torch

    from rldecoder.lm.smoke import smoke_test
    from rldecoder.planning.throughput import keep
    from rldecoder.provenance import device_name

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise BadInputError(
            f"There is no device {device!r} here.",
            "A smoke test runs on `cpu`, or on `cuda` where torch sees such a device.",
            "Leave --device out.",
        )
    result = smoke_test(model, device=device, note=lambda text: console.print(escape(text)))
    keep(result, device_name(torch.device(device)), torch.get_num_threads())
    table = Table(title=escape(f"smoke test of {model}"), title_justify="left", show_header=False)
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
