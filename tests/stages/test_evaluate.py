"""The stage on the debug run's artifacts, and tasks by file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rldecoder import schemas
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.config.tasks import FileTask
from rldecoder.evals.targets import TARGETS
from rldecoder.runner import plan, read_input
from rldecoder.seeds import derive_seed
from rldecoder.stages.context import InputArtifact, StageContext
from rldecoder.stages.evaluate import ANSWERS, TASKS, Answer, _task_drop, _task_rows
from rldecoder.stages.table import stage_named

STAGE = stage_named("evaluate")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_run_config(ROOT / "configs" / "debug.yaml")


@pytest.fixture(scope="module")
def inputs(debug_store: Path, config: RunConfig) -> dict[str, InputArtifact]:
    refs, store = plan(config), ArtifactStore(debug_store)
    return {name: read_input(store, refs[name]) for name in (*STAGE.inputs, STAGE.name)}


@pytest.mark.slow
def test_what_is_published(inputs: dict[str, InputArtifact]) -> None:
    folder = inputs[STAGE.name].path
    targets = schemas.read_json(folder / "targets.json")
    assert [row["key"] for row in targets] == [target.key for target in TARGETS]
    for row in targets:
        assert (row["met"] is None) == (row["value"] is None), row["key"]
    mass = schemas.read_json(inputs["rank_features"].path / "mass.json")["label"]
    (row,) = (row for row in targets if row["key"] == "top10_mass")
    for target in ("frozen", "decoder"):
        share = mass[target]["top_k"]["10"]["per_position"]
        assert f"{target} {share['value']:.3f}, 95 % interval {share['low']:.3f}" in row["note"]
    assert row["value"] == mass["frozen"]["top_k"]["10"]["per_position"]["value"]
    tasks = schemas.read_parquet(folder / "tasks.parquet")
    assert tasks.schema == TASKS
    models = {(row["task"], row["model"]) for row in tasks.to_pylist()}
    assert models == {
        (task, model) for task in ("addition", "cloze") for model in ("frozen", "supervised", "rl")
    }
    assert schemas.read_parquet(folder / "answers.parquet").schema == ANSWERS
    faithfulness = schemas.read_json(folder / "faithfulness.json")
    assert set(faithfulness) == {"test", "ood"}
    found = schemas.read_json(folder / "interpretability.json")
    assert set(found) == {"label_coverage", "importance_mass", "deletion", "claims"}


@pytest.mark.slow
def test_tasks_by_file_and_missing_files(
    inputs: dict[str, InputArtifact],
    config: RunConfig,
    context: Callable[..., StageContext],
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(
        pa.table(
            {"split": ["test"] * 3, "question": ["a?", "b?", "c?"], "answer": ["x", "y", "z"]}
        ),
        path,
    )
    changed = config.evaluate.model_copy(
        update={
            "file_tasks": (
                FileTask(name="mine", path=path, metric="f1", max_new_tokens=3),
                FileTask(name="gone", path=tmp_path / "gone.parquet"),
            )
        }
    )
    ctx = context("external", seed=derive_seed(config.seed, STAGE.name))
    output = STAGE.run(inputs, changed, ctx)
    assert output.reasons == ("task files not found: gone",)
    rows = schemas.read_parquet(ctx.out / "tasks.parquet").to_pylist()
    assert sum(row["task"] == "mine" for row in rows) == 3
    # The other tasks are untouched by the file.
    published = inputs[STAGE.name].path
    for row in schemas.read_parquet(published / "tasks.parquet").to_pylist():
        assert row in rows
    first = STAGE.fingerprint(changed)
    assert first["gone"] == "missing"
    path.write_bytes(path.read_bytes() + b" ")
    assert STAGE.fingerprint(changed)["mine"] != first["mine"]


def answers(model: str, scores: list[float]) -> list[Answer]:
    return [Answer("t", model, i, "a", "b", score) for i, score in enumerate(scores)]


def test_drop_is_the_paired_difference_to_the_frozen_model(config: RunConfig) -> None:
    rows = _task_rows(
        answers("frozen", [1, 1, 1, 0]) + answers("rl", [1, 0, 1, 0]), config.evaluate, seed=0
    )
    found = {row["model"]: row for row in rows}
    assert found["frozen"]["drop"] == 0.0
    assert found["rl"]["drop"] == 0.25
    assert found["rl"]["ci_low"] < 0.5 < found["rl"]["ci_high"]
    measured = _task_drop(rows, 0.03)
    assert measured.value == 0.25


def test_nothing_to_drop_is_unknown_not_met(config: RunConfig) -> None:
    rows = _task_rows(answers("frozen", [0, 0]) + answers("rl", [0, 0]), config.evaluate, seed=0)
    assert _task_drop(rows, 0.03).value is None
