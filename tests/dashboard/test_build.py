"""The report's data from a finished run: every table filled, all text safe, sums that agree."""

from __future__ import annotations

import pytest

from rldecoder import Run
from rldecoder.dashboard.build import build_report, summary
from rldecoder.dashboard.report import ReportData
from rldecoder.stages.inputs import ReportInputs


@pytest.fixture(scope="module")
def inputs(run: Run) -> ReportInputs:
    return run.inputs(ReportInputs)


@pytest.fixture(scope="module")
def data(inputs: ReportInputs) -> ReportData:
    return build_report(inputs, title="a\u202eb", max_features=3)


def test_every_part_of_the_page_has_content(data: ReportData) -> None:
    assert "\u202e" not in data.title
    for part in (
        data.targets, data.pipeline, data.faithfulness, data.tasks, data.label_methods,
        data.claim_methods, data.simulation_rows, data.examples, data.configs, data.figures,
        data.caveats,
    ):  # fmt: skip
        assert part
    assert len(data.features) == 3
    assert all(feature.examples for feature in data.features)
    assert {row.split for row in data.faithfulness} == {"test", "ood"}


def test_tiles_count_what_the_tables_hold(data: ReportData) -> None:
    tiles = {fact.name: fact.value for fact in data.facts}
    met = sum(row.met is True for row in data.targets)
    assert tiles["targets met"] == f"{met} of {len(data.targets)}"


def test_the_summary_has_every_stage_and_no_time(data: ReportData, inputs: ReportInputs) -> None:
    found = summary(data, inputs)
    assert list(found.stages) == [artifact.stage for artifact in inputs]
    names = {name for stage in found.stages.values() for name in stage.metrics}
    assert not [name for name in names if name.endswith(("_seconds", "_per_second", "_bytes"))]
