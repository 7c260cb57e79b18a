"""Reports of quality gates: every metric with its formula, the plan's target and this run's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import ConfigDict, RootModel

from rldecoder.schemas import JsonFile, JsonRecord, Scalar, write_json


class Band(NamedTuple):
    """Values that count as met; an open side is None."""

    low: float | None
    high: float | None
    inclusive: bool = False

    def holds(self, value: float | None) -> bool:
        """Whether a value lies inside; a value that could not be measured does not."""
        if value is None or not math.isfinite(value):
            return False
        if self.inclusive:
            return not (
                (self.low is not None and value < self.low)
                or (self.high is not None and value > self.high)
            )
        return not (
            (self.low is not None and value <= self.low)
            or (self.high is not None and value >= self.high)
        )

    def plain(self) -> float | tuple[float, float]:
        """The bound, or both, for JSON."""
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        return bounds[0] if len(bounds) == 1 else (bounds[0], bounds[1])

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"below {self.high:g}" if self.low is None else f"above {self.low:g}"


class GateEntry(JsonRecord):
    """One metric of a report."""

    value: float | int | None
    """None where it could not be measured."""
    unit: str
    """Of the value."""
    formula: str
    """How it was computed, in short."""
    target: float | tuple[float, float] | None = None
    """The original plan's; shown whatever the config gates on."""
    met: bool | None = None
    """Whether the plan's target is met; None where it has none or nothing was measured."""
    threshold: float | tuple[float, float] | None = None
    """What this run's config demands, of gated metrics."""
    passed: bool | None = None
    """Whether it does, of gated metrics."""

    @property
    def gates(self) -> bool:
        """Whether the verdict depends on it."""
        return self.passed is not None

    def judged(self, target: Band, threshold: Band | None = None) -> GateEntry:
        """With the plan's target and, where the metric gates, what this run demands."""
        judged = self.model_copy(update={"target": target.plain(), "met": target.holds(self.value)})
        if threshold is None:
            return judged
        return judged.model_copy(
            update={"threshold": threshold.plain(), "passed": threshold.holds(self.value)}
        )


def metric(value: float | None, unit: str, formula: str) -> GateEntry:
    """A metric that no target is set for; a value that is not finite was not measured."""
    if value is not None and not math.isfinite(value):
        value = None
    return GateEntry(value=value, unit=unit, formula=formula)


class GateReport(JsonFile, RootModel[dict[str, GateEntry]]):
    """All metrics of a gate by name. JSON has `threshold` and `passed` of gated ones only."""

    model_config = ConfigDict(frozen=True)

    def __getitem__(self, name: str) -> GateEntry:
        return self.root[name]

    def items(self) -> Iterable[tuple[str, GateEntry]]:
        """Names and metrics, in order."""
        return self.root.items()

    def get(self, name: str) -> GateEntry | None:
        """A metric, or None where the report has none of that name."""
        return self.root.get(name)

    def headline(self, names: Iterable[str] | None = None) -> dict[str, Scalar]:
        """Values by name for the manifest; None takes all."""
        chosen = self.root if names is None else names
        return {name: self.root[name].value for name in chosen}

    def rows(self) -> Mapping[str, Mapping[str, Scalar | list[float]]]:
        """Plain values, as in the file."""
        return {
            name: entry.model_dump(
                mode="json", exclude=None if entry.gates else {"threshold", "passed"}
            )
            for name, entry in self.items()
        }

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, self.rows())
