"""`rldecoder configs`: the configs that come with the package, listed or laid out in a folder."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from rldecoder.config.named import SHIPPED_FOLDER, shipped_configs
from rldecoder.errors import BadInputError
from rldecoder.files import explained, write_bytes
from rldecoder.terminal import Terminal

PREFECT_FILE = Path(__file__).parent / "prefect.yaml"
"""A link to the project's prefect.yaml, so that an installed package carries it."""


def configs(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="Write them and prefect.yaml there.", show_default=False
        ),
    ] = None,
) -> None:
    """List the configs that come with the package, or lay them out in a folder to change them.

    Examples: rldecoder configs; rldecoder configs my-project; rldecoder run debug.
    """
    terminal = Terminal()
    if folder is None:
        from rldecoder.config.run import load_run_config

        for name, path in shipped_configs().items():
            said = load_run_config(path).description
            terminal.print(f"[bold]{name:16}[/bold] {escape(said)}", soft_wrap=True)
        terminal.print("\n`rldecoder run NAME` runs one; `rldecoder configs DIR` copies all.")
        return
    written = lay_out(folder)
    terminal.print(escape(f"{written} files in {folder}: configs/ and prefect.yaml"))


def lay_out(folder: Path) -> int:
    """Write configs/ and prefect.yaml into a folder; how many files.

    Raises:
        BadInputError: a file is there already and says something else; nothing is written then.
        NoResourceError: the folder cannot be written to.
    """
    files = {
        folder / "configs" / path.relative_to(SHIPPED_FOLDER): path.read_bytes()
        for path in sorted(SHIPPED_FOLDER.glob("**/*.yaml"))
    }
    files[folder / "prefect.yaml"] = _prefect_yaml()

    # All or nothing: a folder of both old and new files would be neither.
    with explained(folder, "configs"):
        changed = [path for path, data in files.items() if _differs(path, data)]
        if changed:
            raise BadInputError(
                f"{changed[0]} is there already and says something else.",
                "Configs of one's own are never overwritten.",
                "Name another folder, or move that file away.",
            )
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)
    return len(files)


def _differs(path: Path, data: bytes) -> bool:
    return (path.exists() or path.is_symlink()) and not (
        path.is_file() and path.read_bytes() == data
    )


def _prefect_yaml() -> bytes:
    """prefect.yaml whose flows are the installed ones: the new folder has no flows/ of its own."""
    text = PREFECT_FILE.read_text(encoding="utf-8")
    for runner in entry_points(group="rldecoder.runners", name="prefect"):
        spec = find_spec(runner.module)
        if spec is not None and spec.origin is not None:
            flows = Path(spec.origin).resolve().parent
            text = re.sub(r"(?m)^(\s*entrypoint: )flows/", rf"\g<1>{flows.as_posix()}/", text)
    return text.encode()
