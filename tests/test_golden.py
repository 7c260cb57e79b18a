"""Golden numbers: the headline metrics of the debug run, each with its tolerance."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from rldecoder.stages.table import STAGES
from tests.golden.write import GOLDEN, headline_metrics

WANTED = json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_every_stage_has_golden_numbers() -> None:
    assert set(WANTED["stages"]) == {stage.name for stage in STAGES}
    assert sum(len(metrics) for metrics in WANTED["stages"].values()) > 200


@pytest.mark.skipif(
    platform.python_version() != WANTED["python"],
    reason="the corpus is this Python's own documentation; the numbers are another version's",
)
def test_the_debug_run_has_its_golden_numbers(debug_store: Path) -> None:
    found = headline_metrics(debug_store)
    wrong = []
    for stage, metrics in WANTED["stages"].items():
        assert set(found[stage]) == set(metrics), stage
        for name, wanted in metrics.items():
            value, expected = found[stage][name], wanted["value"]
            if isinstance(expected, float) and isinstance(value, float | int):
                near = abs(value - expected) <= wanted["tolerance"]
            else:
                near = value == expected
            if not near:
                wrong.append(f"{stage}.{name}: {value}, not {expected} ± {wanted['tolerance']}")
    assert wrong == []
