"""Artifacts for stage tests, as the runner would hand them over, in folders named by stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rldecoder.artifacts.base import Artifact
from rldecoder.stages.context import Output

A = TypeVar("A", bound=Artifact)
Inputs = TypeVar("Inputs", bound=tuple[Artifact, ...])


def published(
    kind: type[A],
    folder: Path,
    output: Output | None = None,
    config: Mapping[str, Any] | None = None,
) -> A:
    """What a stage left in `folder` and returned, as an artifact."""
    returned = output or Output()
    return kind(
        folder=folder,
        digest="0" * 16,
        metrics=returned.metrics,
        config=config or {},
        verdict=returned.verdict,
    )


def inputs_in(inputs: type[Inputs], root: Path, **given: Artifact) -> Inputs:
    """A stage's inputs: those given, by field, and the others from `root/<stage>`.

    A file that the test does not write is missed only where the stage reads it.
    """
    fields = {
        name: published(kind, root / kind.stage) for name, kind in get_type_hints(inputs).items()
    }
    return inputs(**(fields | given))  # type: ignore[call-arg]  # a NamedTuple's fields


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
