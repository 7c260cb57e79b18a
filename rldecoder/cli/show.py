"""The commands that only look: status, explain, smoke, models, devices."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rldecoder.artifacts.catalogue import TrainedExplainer, TrainedSae
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.cli.collection import no_collection
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.terminal import Terminal

if TYPE_CHECKING:
    from rldecoder.explain.explanation import Explanation
    from rldecoder.opened import Opened
    from rldecoder.run import Run


WIDE = 100
"""Columns from which tables show what can be done without, too."""


def show_status(run: Run, console: Console, named: str = "CONFIG", *, verify: bool = False) -> None:
    """One row a stage: its address and what is there; then what to do next.

    Args:
        named: the words of a command line that name the run (`options.same_run`).
        verify: read and hash every file; else manifests and sizes are looked at.
    """
    table = Table(title=escape(f"{run.config.name} in {run.store.place}"), title_justify="left")
    shown = 5 if console.width >= WIDE else 4
    for column in ("stage", "digest", "state", "took", "device")[:shown]:
        table.add_column(column, justify="right" if column == "took" else "left", no_wrap=True)
    for name, ref in run.refs.items():
        table.add_row(*(name, ref.digest, *_state(run.store, ref, verify))[:shown])
    console.print(table)

    missing = run.missing(run.refs)
    if missing:
        done = len(run.refs) - len(missing)
        said = f"{done} of {len(run.refs)} stages are there; next: rldecoder run {named}"
    else:
        said = f"all stages are there; explain a text: rldecoder explain {named} TEXT"
    console.print(escape(said), soft_wrap=True)


def _state(store: ArtifactStore, ref: ArtifactRef, verify: bool) -> tuple[str, str, str]:
    if not store.is_published(ref):
        progress = store.progress_path(ref)
        if progress.is_dir() and any(progress.iterdir()):
            return "[yellow]interrupted, resumable[/yellow]", "", ""
        return "[dim]missing[/dim]", "", ""
    try:
        manifest = store.verify(ref) if verify else store.looked_at(ref)
    except DamagedFileError:
        return "[red]damaged, will be rebuilt[/red]", "", ""
    state = "[green]published[/green]"
    if manifest.verdict == "fail":
        state = "[red]published, gate failed[/red]"
    elif manifest.caveats:
        state = "[yellow]published, with caveats[/yellow]"
    return state, f"{manifest.wall_seconds:,.1f} s", escape(manifest.device)


@no_collection()
def show_explanation(
    run: Opened,
    prompt: str,
    console: Console,
    *,
    as_json: bool = False,
    html: Path | None = None,
    list_caveats: bool = False,
) -> None:
    """Explain one prompt with the published decoder; what it is doing is said on stderr.

    Args:
        as_json: print one JSON object (ASCII, so that no terminal acts on it) and nothing else.
        html: write a self-contained page there, too.
        list_caveats: print all caveats of the run; else one line counts them.

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
    caveats = run.artifact(TrainedExplainer).caveats
    with Terminal(stderr=True).status("checking the run's files ...") as doing:
        artifacts = {kind.stage: run.artifact(kind) for kind in EXPLAINING}
        doing.update("loading model, SAE, decoder and labels ...")
        from rldecoder.explain.explanation import render_explanation
        from rldecoder.explain.familiarity import familiarity

        reader = run.reader()
        doing.update("reading the text ...")
        reading = reader.read(prompt)
        best = run.artifact(TrainedSae).best
        known = familiarity(reading.states, reader.sae, best.fvu)
        doing.update("testing claims: taking features out of both models ...")
        explanation = reading.explain()

    if html is not None:
        _write_page(html, explanation, run.name, caveats)
    if as_json:
        digests = {name: artifact.digest for name, artifact in artifacts.items()}
        value = {
            "run": run.name, "artifacts": digests, "caveats": list(caveats),
            "familiarity": None if known is None else known._asdict() | {"verdict": known.verdict},
            **explanation.to_json(),
        }  # fmt: skip
        console.out(json.dumps(value, indent=2))
        return
    console.print(render_explanation(explanation))
    if known is not None:
        style = "dim" if known.verdict == "like" else "yellow"
        console.print(f"[{style}]{escape(known.said)}[/{style}]")
    _print_caveats(console, caveats, list_caveats)
    if html is not None:
        console.print(f"page: {escape(str(html))}", soft_wrap=True)


def _write_page(html: Path, explanation: Explanation, name: str, caveats: Sequence[str]) -> None:
    from rldecoder.dashboard.explanation import explanation_page

    try:
        page = explanation_page(explanation, name, caveats)
        html.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise BadInputError(
            f"The page {html} cannot be written.", str(error), "Give another path to --html."
        ) from error


def _print_caveats(console: Console, caveats: Sequence[str], whole: bool) -> None:
    if whole or len(caveats) == 1:
        for caveat in caveats:
            console.print(f"[yellow]caveat[/yellow] {escape(caveat)}")
    elif caveats:
        stages = Counter(caveat.split(":")[0] for caveat in caveats)
        listed = ", ".join(f"{name} {count}" for name, count in stages.items())
        console.print(
            f"[yellow]{len(caveats)} caveats[/yellow] of this run ({escape(listed)}); "
            "--caveats lists them"
        )


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
    wide = console.width >= WIDE
    for column in ("name", "size", "layers", *(("width", "hook", "licence") if wide else ())):
        table.add_column(column, no_wrap=column in ("name", "size", "layers"))
    table.add_column("weights", overflow="fold")
    for row in list_models():
        more = (row.d_model, row.hook_layer, row.licence) if wide else ()
        values = (row.name, row.parameters, row.num_layers, *more, row.weights)
        table.add_row(*(escape(str(value)) for value in values))
    console.print(table)
    console.print(
        "A name here, a hub name (google/gemma-2-2b) or a folder: rldecoder init MINE.yaml "
        "--model NAME --text FILE",
        soft_wrap=True,
    )  # fmt: skip


def show_devices(console: Console) -> None:
    """Accelerators by NVML, with leases."""
    from rldecoder.devices import device_rows

    table = Table(title="devices", title_justify="left")
    for column in ("device", "name", "memory free", "utilisation", "state"):
        table.add_column(column)
    for row in device_rows():
        table.add_row(*(escape(str(value)) for value in row))
    console.print(table)
