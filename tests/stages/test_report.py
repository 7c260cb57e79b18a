"""The report of the debug run: complete, repeatable, self-contained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rldecoder import schemas
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.evals.targets import TARGETS
from rldecoder.runner import plan, read_input
from rldecoder.seeds import derive_seed
from rldecoder.stages.context import InputArtifact, StageContext
from rldecoder.stages.table import stage_named

STAGE = stage_named("report")

FIGURES = {
    "architecture", "lens", "sweep", "frontier", "sae", "decoder", "density", "ppo", "ppo_task",
    "tasks", "mass", "top10_mass", "calibration", "deletion", "precision",
}  # fmt: skip
"""What a run with a sweep, a frontier and PPO must show, and the debug run has all of them."""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_run_config(ROOT / "configs" / "debug.yaml")


@pytest.fixture(scope="module")
def inputs(debug_store: Path, config: RunConfig) -> dict[str, InputArtifact]:
    refs, store = plan(config), ArtifactStore(debug_store)
    return {name: read_input(store, refs[name]) for name in (*STAGE.inputs, STAGE.name)}


def test_every_other_stage_is_an_input() -> None:
    assert len(STAGE.inputs) == 18


@pytest.mark.slow
def test_the_page_shows_everything(inputs: dict[str, InputArtifact]) -> None:
    folder = inputs[STAGE.name].path
    html = (folder / "report.html").read_text(encoding="utf-8")
    for target in TARGETS:
        assert target.name.replace("'", "&#39;") in html
    for name in STAGE.inputs:
        assert inputs[name].digest[:10] in html
        for caveat in inputs[name].caveats:
            assert caveat[:40].replace("'", "&#39;") in html
    assert not re.search(r'(?:src|href)="(?!#|data:,")', html)
    assert html.count("<figure") == len(FIGURES)
    for kind in ("svg", "pdf"):
        assert {file.stem for file in (folder / "figures").glob(f"*.{kind}")} == FIGURES
    coverage = schemas.read_json(inputs["evaluate"].path / "interpretability.json")
    high = 100 * coverage["label_coverage"]["all"]["high"]
    assert f"Wilson 95 %: 0 to {high:.0f} %" in html
    test = schemas.read_json(inputs["label_features"].path / "controls.json")["calibration"]["test"]
    assert f"ECE {test['ece']:.3f}, Brier score {test['brier']:.3f}, {test['n']} labels" in html
    assert "other reward weights" in (folder / "figures" / "ppo.svg").read_text()
    assert "dead latents" in (folder / "figures" / "sae.svg").read_text()
    assert html.count('class="panel example"') >= 3


@pytest.mark.slow
def test_pages_from_the_manifests(inputs: dict[str, InputArtifact]) -> None:
    folder = inputs[STAGE.name].path
    checks = (folder / "reproducibility.md").read_text(encoding="utf-8")
    for name in STAGE.inputs:
        assert f"| {name} | `{inputs[name].digest}` |" in checks
    assert "| Every stage has its seed | yes |" in checks
    assert "| Every gate passed | **no** | gate\\_sae" in checks
    assert "| torch | " in checks
    assert "| No document is in two splits | yes |" in checks
    assert checks.count("two splits") == 1
    notes = (folder / "release_notes.md").read_text(encoding="utf-8")
    for target in TARGETS:
        assert f"| {target.name} |" in notes
    entry = (folder / "logbook_entry.md").read_text(encoding="utf-8")
    assert entry.startswith("## 2")
    assert "gate_sae said no: " in entry


@pytest.mark.slow
def test_a_rerun_differs_in_nothing_but_times(
    inputs: dict[str, InputArtifact], config: RunConfig, context: Callable[..., StageContext]
) -> None:
    ctx = context(STAGE.name, seed=derive_seed(config.seed, STAGE.name))
    STAGE.run({name: inputs[name] for name in STAGE.inputs}, config.report, ctx)
    published = inputs[STAGE.name].path
    names = sorted(path.relative_to(ctx.out) for path in ctx.out.rglob("*") if path.is_file())
    for name in names:
        assert (ctx.out / name).read_bytes() == (published / name).read_bytes(), name
    summary = schemas.read_json(ctx.out / "summary.json")
    assert [row["key"] for row in summary["targets"]] == [target.key for target in TARGETS]
    assert set(summary["stages"]) == set(STAGE.inputs)
    assert "wall" not in (ctx.out / "summary.json").read_text()
