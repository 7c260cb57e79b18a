"""Training curves: kept with the checkpoint while training runs, published as Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from rldecoder import schemas


class CurvePoint(NamedTuple):
    """One value of one metric at one step."""

    step: int
    name: str
    value: float


class Curves(BaseModel):
    """An append-only list of curve points.

    It goes into every checkpoint, so that a resumed run publishes the same curves as an
    undisturbed one.
    """

    rows: list[CurvePoint] = []

    def log(self, step: int, **values: float) -> None:
        """Append `values` at `step`."""
        self.rows.extend(CurvePoint(step, name, float(value)) for name, value in values.items())

    def last(self, name: str) -> float | None:
        """The newest value of `name`, or None."""
        return next((row.value for row in reversed(self.rows) if row.name == name), None)

    def write(self, path: Path) -> None:
        """Publish as Parquet (schemas.CURVES)."""
        schemas.write_parquet(
            path,
            {
                "step": [row.step for row in self.rows],
                "name": [row.name for row in self.rows],
                "value": [row.value for row in self.rows],
            },
            schemas.CURVES,
        )


def read_curves(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Read curves back as name -> (steps, values)."""
    table = schemas.read_parquet(path)
    out: dict[str, tuple[list[int], list[float]]] = {}
    for row in table.to_pylist():
        steps, values = out.setdefault(row["name"], ([], []))
        steps.append(row["step"])
        values.append(row["value"])
    return out
