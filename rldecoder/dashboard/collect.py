"""What the report shows of all artifacts: the pipeline, its caveats, its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import PHASES
from rldecoder.visible_text import visible_text

SHOWN_METRICS = 6
WALL_SUFFIXES = ("_per_second", "_seconds", "_bytes")


class StageShown(NamedTuple):
    """One stage of the pipeline."""

    name: str
    digest: str | None = None
    """None, like the rest, of what is not published yet."""
    verdict: str | None = None
    wall: str | None = None
    metrics: Sequence[tuple[str, str]] = ()
    """Its headline numbers."""


class PhaseShown(NamedTuple):
    """A part of the pipeline."""

    title: str
    stages: Sequence[StageShown]


class ConfigShown(NamedTuple):
    """A stage's configuration."""

    stage: str
    digest: str
    config: Sequence[tuple[str, str]]
    """Names and values, nested ones as `a.b`."""


def pipeline(artifacts: Sequence[Artifact]) -> list[PhaseShown]:
    """The phases with their stages: digest, verdict, wall time, headline metrics."""
    published = {artifact.stage: artifact for artifact in artifacts}
    return [
        PhaseShown(
            phase.upper() if phase == "rl" else phase.capitalize(),
            [_stage(kind.stage, published.get(kind.stage)) for kind in kinds],
        )
        for phase, kinds in PHASES.items()
    ]


def _stage(name: str, artifact: Artifact | None) -> StageShown:
    if artifact is None:
        return StageShown(name)
    metrics = [
        (key, format_value(value))
        for key, value in artifact.metrics.items()
        if value is not None and not key.endswith(WALL_SUFFIXES)
    ]
    return StageShown(
        name,
        artifact.digest,
        artifact.verdict,
        format_seconds(artifact.wall_seconds),
        metrics[:SHOWN_METRICS],
    )


def caveats(artifacts: Sequence[Artifact]) -> list[str]:
    """All caveats of all artifacts, each once, in the order of the pipeline."""
    texts = (text for artifact in artifacts for text in artifact.caveats)
    return [visible_text(text, 600) for text in dict.fromkeys(texts)]


def format_value(value: Any) -> str:
    """A metric in few characters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return visible_text(str(value), 40)


def format_seconds(seconds: float) -> str:
    """A wall time in few characters."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def config_rows(artifacts: Sequence[Artifact]) -> list[ConfigShown]:
    """Every stage's configuration, for the reproducibility section."""
    return [ConfigShown(one.stage, one.digest, list(_flat(one.config))) for one in artifacts]


def _flat(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        parts = {f".{key}": part for key, part in value.items()}
    elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        parts = {f"[{index}]": part for index, part in enumerate(value)}
    else:
        yield place.removeprefix("."), visible_text(str(value), 200)
        return
    for name, part in parts.items():
        yield from _flat(part, place + name)
