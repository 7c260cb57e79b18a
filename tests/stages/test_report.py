"""The report of the debug run: complete, repeatable, self-contained."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from rldecoder import Run, schemas
from rldecoder.artifacts.catalogue import Report
from rldecoder.config.run import RunConfig
from rldecoder.evals.targets import TARGETS
from rldecoder.seeds import derive_seed
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import ReportInputs
from rldecoder.stages.table import stage_named

STAGE = stage_named(Report.stage)

FIGURES = {
    "architecture", "lens", "sweep", "frontier", "sae", "decoder", "density", "ppo", "ppo_task",
    "tasks", "arms", "coverage", "mass", "top10_mass", "calibration", "deletion", "precision",
}  # fmt: skip
"""What a run with a sweep, a frontier and PPO must show, and the debug run has all of them."""


@pytest.fixture(scope="module")
def inputs(run: Run) -> ReportInputs:
    return run.inputs(ReportInputs)


@pytest.fixture(scope="module")
def report(run: Run) -> Report:
    """What the debug run published."""
    return run.artifact(Report)


def test_every_other_stage_is_an_input() -> None:
    assert len(STAGE.upstream) == 18


@pytest.mark.slow
def test_the_page_shows_everything(inputs: ReportInputs, report: Report) -> None:
    html = report.page.read_text(encoding="utf-8")
    for target in TARGETS:
        assert target.name.replace("'", "&#39;") in html
    for artifact in inputs:
        assert artifact.digest[:10] in html
        for caveat in artifact.caveats:
            assert caveat[:40].replace("'", "&#39;") in html
    assert not re.search(r'(?:src|href)="(?!#|data:,")', html)
    assert html.count("<figure") == len(FIGURES)
    for kind in ("svg", "pdf"):
        assert {file.stem for file in report.figures.glob(f"*.{kind}")} == FIGURES
    covered = inputs.evaluation.interpretability.label_coverage["all"]
    assert f"Wilson 95 %: {100 * covered.low:.0f} to {100 * covered.high:.0f} %" in html
    test = inputs.labels.controls.calibration.test
    assert f"ECE {test.ece:.3f}, Brier score {test.brier:.3f}, {test.n} labels" in html
    assert "other reward weights" in (report.figures / "ppo.svg").read_text()
    assert "dead latents" in (report.figures / "sae.svg").read_text()
    assert html.count('class="panel example"') >= 3


@pytest.mark.slow
def test_pages_from_the_manifests(inputs: ReportInputs, report: Report) -> None:
    checks = report.reproducibility.read_text(encoding="utf-8")
    for artifact in inputs:
        assert f"| {artifact.stage} | `{artifact.digest}` |" in checks
    assert "| Every stage has its seed | yes |" in checks
    assert "| Every gate passed | **no** | gate\\_sae" in checks
    assert "| torch | " in checks
    assert "| No document is in two splits | yes |" in checks
    assert checks.count("two splits") == 1
    notes = report.release_notes.read_text(encoding="utf-8")
    for target in TARGETS:
        assert f"| {target.name} |" in notes
    assert f"- `{inputs.final.stage}/{inputs.final.digest}`" in notes
    entry = report.logbook_entry.read_text(encoding="utf-8")
    assert entry.startswith("## 2")
    assert "gate_sae said no: " in entry


@pytest.mark.slow
def test_a_rerun_differs_in_nothing_but_times(
    inputs: ReportInputs,
    report: Report,
    config: RunConfig,
    context: Callable[..., StageContext],
) -> None:
    ctx = context(STAGE.name, seed=derive_seed(config.seed, STAGE.name))
    STAGE.run(inputs, config.report, ctx)
    names = sorted(path.relative_to(ctx.out) for path in ctx.out.rglob("*") if path.is_file())
    for name in names:
        assert (ctx.out / name).read_bytes() == (report.folder / name).read_bytes(), name
    summary = schemas.read_json(Report.summary.path(ctx.out))
    assert [row["key"] for row in summary["targets"]] == [target.key for target in TARGETS]
    assert set(summary["stages"]) == set(STAGE.upstream)
    assert "wall" not in Report.summary.path(ctx.out).read_text()
