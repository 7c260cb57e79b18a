"""Golden numbers: the headline metrics of the debug run, each with its tolerance."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from rldecoder.stages.table import STAGES
from tests.golden import write
from tests.golden.write import golden_file, headline_metrics


def wanted_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", sorted(write.FILES.values()))
def test_every_stage_has_golden_numbers(name: str) -> None:
    stages = wanted_of(Path(write.__file__).parent / name)["stages"]
    assert set(stages) == {stage.name for stage in STAGES}
    known = [wanted for metrics in stages.values() for wanted in metrics.values()]
    assert sum("value" in wanted for wanted in known) > 200
    assert sum("unmeasured" in wanted for wanted in known) < 5


def test_the_debug_run_has_its_golden_numbers(debug_store: Path) -> None:
    path = golden_file()
    if path is None:
        pytest.skip("nobody has written the numbers of this kind of CPU")
    golden = wanted_of(path)
    if platform.python_version() != golden["python"]:
        pytest.skip("the corpus is Python's own documentation; the numbers are another version's")
    found = headline_metrics(debug_store)
    wrong = []
    for stage, metrics in golden["stages"].items():
        assert set(found[stage]) == set(metrics), stage
        for name, wanted in metrics.items():
            if "unmeasured" in wanted:
                continue
            value, expected = found[stage][name], wanted["value"]
            if isinstance(expected, float) and isinstance(value, float | int):
                near = abs(value - expected) <= wanted["tolerance"]
            else:
                near = value == expected
            if not near:
                wrong.append(f"{stage}.{name}: {value}, not {expected} ± {wanted['tolerance']}")
    assert wrong == []
