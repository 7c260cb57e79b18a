"""Write the golden numbers from a finished debug store: python -m tests.golden.write STORE

A change that should move no number runs this never. One that should says in docs/logbook.md what
moved and why. Tolerances that stand in the file are kept. A CPU kind has a file of its own: sums
round differently there, and training from random weights makes much of little. A number that moved
while no such CPU was at hand is marked `unmeasured`, with the reason, until this is run on one.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch

FILES = {"AVX512": "debug.json", "AVX2": "debug_avx2.json"}
"""By what torch calls the CPU."""
LEFT_OUT = ("_per_second", "_seconds", "_bytes")
"""Ends of the names of what depends on the machine."""


def golden_file() -> Path | None:
    """The numbers of this kind of CPU; None where nobody has written any."""
    name = FILES.get(torch.backends.cpu.get_cpu_capability())
    return None if name is None else Path(__file__).parent / name


def headline_metrics(store: Path) -> dict[str, dict[str, float | int | str | bool | None]]:
    """What the manifests of a store with one run say, by stage."""
    found = {}
    for manifest in sorted(store.glob("*/*/manifest.json")):
        values = json.loads(manifest.read_text(encoding="utf-8"))
        found[values["stage"]] = {
            name: value for name, value in values["metrics"].items() if not name.endswith(LEFT_OUT)
        }
    return found


def default_tolerance(stage: str, value: object) -> float:
    """How far a number may be off on another CPU: sums round differently, and training repeats it.

    Counts, words and marks are exact. What rests on a few claims or answers moves in steps.
    """
    if not isinstance(value, float):
        return 0.0
    if stage in ("train_explainer", "label_features", "rank_features"):
        return 0.15
    return max(0.02 * abs(value), 0.005)


def main(store: Path) -> None:
    """Keep tolerances, replace values."""
    golden = golden_file()
    if golden is None:
        sys.exit("Golden numbers are kept for CPUs with AVX2 or AVX-512.")
    known = json.loads(golden.read_text(encoding="utf-8"))["stages"] if golden.is_file() else {}
    stages = {
        stage: {
            name: {
                "value": value,
                "tolerance": known.get(stage, {})
                .get(name, {})
                .get("tolerance", default_tolerance(stage, value)),
            }
            for name, value in metrics.items()
        }
        for stage, metrics in headline_metrics(store).items()
    }
    written = {"python": platform.python_version(), "stages": stages}
    golden.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
