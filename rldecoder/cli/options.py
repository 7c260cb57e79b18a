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
    run.made_by = f"rldecoder run {same_run(config, store, overrides)}"
    return run


def same_run(config: Path, store: str | None, overrides: list[str] | None) -> str:
    """The words of a command line that name the same run again, quoted for a shell."""
    options = [] if store is None else ["--store", store]
    options += [word for override in overrides or [] for word in ("--set", override)]
    return shlex.join([str(config), *options])
