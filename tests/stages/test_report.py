"""The report of the debug run: complete, repeatable, self-contained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rldecoder import schemas
from rldecoder.artifacts import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.evals.targets import TARGETS
from rldecoder.runner import plan, read_input
from rldecoder.seeds import derive_seed
from rldecoder.stages.context import InputArtifact, StageContext
from rldecoder.stages.table import stage_named

STAGE = stage_named("report")

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
    assert not re.search(r'(?:src|href)="(?!#)', html)
    assert html.count("<figure") == len(list((folder / "figures").glob("*.svg"))) >= 8
    assert len(list((folder / "figures").glob("*.pdf"))) == html.count("<figure")
    assert (folder / "figures" / "architecture.pdf").is_file()
    assert (folder / "figures" / "top10_mass.svg").is_file()
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
