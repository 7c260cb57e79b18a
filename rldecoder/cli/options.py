"""What the commands have in common: their arguments, and the run that they name."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rldecoder.run import Run

ConfigPath = Annotated[Path, typer.Argument(help="A run's YAML, or a name: quickstart.")]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store", help="Artifact store, a folder or s3://bucket/prefix; default: the config's."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one setting: --set train_sae.k=32 (repeatable)."),
]


def open_named(config: Path, store: str | None, overrides: list[str] | None) -> Run:
    """The run of a config, its store opened."""
    from rldecoder.config.run import load_run_config

    loaded = load_run_config(config, overrides or [])
    from rldecoder.run import open_run, python_lines  # slow: only for a config that can be used

    run = open_run(loaded, store)
    run.python = python_lines(config, run.store, overrides or [])
    # Said where something is missing: the one command that makes it.
    more = [f"--store {shlex.quote(store)}"] if store is not None else []
    more += [f"--set {shlex.quote(override)}" for override in overrides or []]
    run.made_by = " ".join(["rldecoder run", shlex.quote(str(config)), *more])
    return run
