"""What a finished stage leaves in the UI, against a stand-in for the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rldecoder import schemas
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore, Manifest
from rldecoder.evals.targets import TARGETS, fill_targets
from rldecoder.stages.table import stage_named
from tasks import pages
from tasks.pages import show_stage


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The UI artifacts by key."""
    made: dict[str, Any] = {}
    for kind in ("table", "link", "markdown"):
        monkeypatch.setattr(
            pages,
            f"create_{kind}_artifact",
            lambda data, key, **more: made.__setitem__(key, {"data": data, **more}),
        )
    return made


def published(root: Path, name: str, files: dict[str, Any], **facts: Any) -> Any:
    """A store with one artifact of the stage `name`."""
    store, stage = ArtifactStore(root), stage_named(name)
    ref = ArtifactRef(kind=stage.kind, stage=name, digest="d" * 16)
    values: dict[str, Any] = {
        "metrics": {}, "verdict": None, "reasons": [], "caveats": [], **facts,
    }  # fmt: skip
    manifest = Manifest(
        kind=stage.kind, stage=name, digest=ref.digest, version=1, config={}, seed=0, inputs={},
        fingerprint={}, files={}, source_digest="", git_commit=None, packages={}, device="cpu",
        device_name="cpu", threads=1, wall_seconds=0.0, peak_memory_bytes=0, resumed=False,
        created_at="", **values,
    )  # fmt: skip
    with store.building(ref) as out:
        for file, content in files.items():
            if isinstance(content, str):
                (out / file).write_text(content)
            else:
                schemas.write_json(out / file, content)
        store.publish(ref, out, manifest)
    return stage, ref, store


def test_headline_numbers(tmp_path: Path, made: dict[str, Any]) -> None:
    show_stage(*published(tmp_path, "train_sae", {}, metrics={"fvu": 0.1, "l0": 32}))
    assert list(made) == ["07-train-sae"]
    assert made["07-train-sae"]["data"] == [
        {"metric": "fvu", "value": 0.1}, {"metric": "l0", "value": 32},
    ]  # fmt: skip


def test_a_gates_criteria_and_its_verdict(tmp_path: Path, made: dict[str, Any]) -> None:
    row = {"value": 0.4, "unit": "share", "target": 0.01, "met": False, "formula": "mean"}
    show_stage(
        *published(
            tmp_path, "gate_sae", {"report.json": {"mse": row}},
            verdict="fail", reasons=["mse 0.4 misses < 0.01"],
        )
    )  # fmt: skip
    assert made["08-gate-sae-gate"]["data"] == [{"name": "mse", **row}]
    assert "**fail**" in made["08-gate-sae-gate"]["description"]
    assert "mse 0.4 misses" in made["08-gate-sae-gate"]["description"]


def test_targets(tmp_path: Path, made: dict[str, Any]) -> None:
    targets = fill_targets({}, {target.source: "evaluate" for target in TARGETS})
    rows = [row.model_dump() for row in targets.root]
    show_stage(*published(tmp_path, "evaluate", {"targets.json": rows}))
    assert made["18-evaluate-targets"]["data"] == rows
    assert {row["met"] for row in rows} == {None}


def test_the_report_is_named_with_its_caveats(tmp_path: Path, made: dict[str, Any]) -> None:
    stage, ref, store = published(
        tmp_path, "report", {"report.html": "<html>"}, caveats=["gate_sae: mse 0.4"]
    )
    show_stage(stage, ref, store)
    page = store.path(ref) / "report.html"
    assert made["19-report-page"]["data"] == page.as_uri()
    assert str(page) in made["19-report-path"]["data"]
    assert "- gate_sae: mse 0.4" in made["19-report-path"]["data"]


def test_keys_never_collide(tmp_path: Path, made: dict[str, Any]) -> None:
    """Metrics of the report stage must not overwrite the link to the report."""
    show_stage(*published(tmp_path, "report", {"report.html": "<html>"}, metrics={"pages": 1}))
    assert set(made) == {"19-report", "19-report-page", "19-report-path"}
