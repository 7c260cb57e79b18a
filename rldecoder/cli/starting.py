"""The commands before a run: `init`, `settings`, `models`, `devices`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rldecoder.errors import BadInputError
from rldecoder.terminal import Terminal

console = Terminal()


def init(
    out: Annotated[
        Path,
        typer.Argument(help="The config to write, such as mine.yaml; without --text a folder."),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A file or folder of your text (repeatable)."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A name of `rldecoder models`, of the hub, or a folder.")
    ] = "smollm2-135m-instruct",
    column: Annotated[
        str, typer.Option(help="Of rows (jsonl, csv, parquet): where the text is.")
    ] = "text",
    separator: Annotated[
        str | None, typer.Option(help="A line that separates documents in text files.")
    ] = None,
    ood: Annotated[
        list[Path] | None,
        typer.Option(help="Out-of-domain text of your own, for evaluation (repeatable)."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Hook layer; default: one with few blocks above it.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=1, help="Time for the run; more text is used where there is more.")
    ] = 10,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a config that is there.")
    ] = False,
) -> None:
    """Write a complete config for your own text, its budgets fitted to text and machine.

    Without text: a folder with the package's configs and prefect.yaml, as `rldecoder configs DIR`.

    Examples: rldecoder init mine.yaml --text notes/ --text book.txt; rldecoder init my-project
    """
    if not text:
        if out.suffix in (".yaml", ".yml"):
            raise BadInputError(
                f"Nothing says what {out.name} is to read.",
                "A config is fitted to its text.",
                "Name it: --text notes/. A name without .yaml is a folder for the shipped configs.",
            )
        from rldecoder.cli.layout import configs

        configs(out)
        return
    from rldecoder.cli.init import Asked, write_config

    write_config(
        Asked(out, model, text, column, separator, ood or [], layer, minutes, overwrite), console
    )


def settings(
    stage: Annotated[
        str | None,
        typer.Argument(
            metavar="[STAGE]",
            help="A section (`train_sae`, `run`), or one setting.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List every setting with its meaning, unit and default.

    Examples: rldecoder settings; rldecoder settings train_sae; rldecoder settings train_sae.k.
    """
    from rldecoder.cli.settings import show_settings

    show_settings(stage, console)


def models() -> None:
    """List the known base models and whether their weights are on this machine."""
    from rldecoder.cli.show import show_models

    show_models(console)


def devices() -> None:
    """List accelerators: memory, utilisation, and who holds a lease."""
    from rldecoder.cli.show import show_devices

    show_devices(console)
