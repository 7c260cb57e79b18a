"""Run configs by name: `debug` is configs/debug.yaml, here or as it came with the package."""

from __future__ import annotations

import re
from pathlib import Path

# A link to configs/, so that an installed package carries the same files.
SHIPPED_FOLDER = Path(__file__).parent / "shipped"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED_FOLDER.glob("*.yaml"))}


def config_path(given: Path | str) -> Path:
    """The file that is meant by `given`: a path that is there, else a name.

    A name is looked for in configs/ of the current folder, then among those of the package. What is
    neither comes back as it is, and is refused when it is read.
    """
    path = Path(given)
    name = str(given)
    if not _NAME.fullmatch(name) or path.is_file():
        return path
    ours = Path("configs") / f"{name}.yaml"
    return ours if ours.is_file() else shipped_configs().get(name, path)
