"""The stage on the debug run's artifacts, and tasks by file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rldecoder.artifacts.catalogue import CATALOGUE, Evaluation
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.config.tasks import FileTask
from rldecoder.evals.comparison import ANSWERS, TASK_SCORES
from rldecoder.evals.targets import TARGETS
from rldecoder.runner import open_artifact, open_inputs, plan
from rldecoder.seeds import derive_seed
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import EvaluateInputs
from rldecoder.stages.table import stage_named
from tests.stages.published import published

STAGE = stage_named(Evaluation.stage)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_run_config(ROOT / "configs" / "debug.yaml")


@pytest.fixture(scope="module")
def inputs(debug_store: Path, config: RunConfig) -> EvaluateInputs:
    inputs: EvaluateInputs = open_inputs(STAGE, plan(config), ArtifactStore(debug_store))
    return inputs


@pytest.fixture(scope="module")
def evaluation(debug_store: Path, config: RunConfig) -> Evaluation:
    """What the debug run published."""
    return open_artifact(Evaluation, plan(config)[STAGE.name], ArtifactStore(debug_store))


@pytest.mark.slow
def test_what_is_published(inputs: EvaluateInputs, evaluation: Evaluation) -> None:
    targets = evaluation.targets
    assert [row.key for row in targets.root] == [target.key for target in TARGETS]
    stages = {kind.stage for kind in CATALOGUE}
    for row in targets.root:
        assert (row.met is None) == (row.value is None), row.key
        assert row.source_stage in stages
    row, mass = targets["top10_mass"], inputs.importance.mass.root["label"]
    for target in ("frozen", "decoder"):
        top = mass[target].top_k
        assert top is not None
        share = top[10].per_position
        assert f"{target} {share.value:.3f}, 95 % interval {share.low:.3f}" in row.note
        if target == "frozen":
            assert row.value == share.value
    assert evaluation.tasks.schema == TASK_SCORES
    models = {(row["task"], row["model"]) for row in evaluation.tasks.to_pylist()}
    assert models == {
        (task, model) for task in ("addition", "cloze") for model in ("frozen", "supervised", "rl")
    }
    assert evaluation.answers.schema == ANSWERS
    assert set(evaluation.faithfulness.root) == {"test", "ood"}
    found = evaluation.interpretability
    assert found.claims == inputs.explainer.evaluation
    assert found.importance_mass == inputs.importance.mass


@pytest.mark.slow
def test_tasks_by_file_and_missing_files(
    inputs: EvaluateInputs,
    evaluation: Evaluation,
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
    rows = published(Evaluation, ctx.out).tasks.to_pylist()
    assert sum(row["task"] == "mine" for row in rows) == 3
    # The other tasks are untouched by the file.
    for row in evaluation.tasks.to_pylist():
        assert row in rows
    first = STAGE.fingerprint(changed)
    assert first["gone"] == "missing"
    path.write_bytes(path.read_bytes() + b" ")
    assert STAGE.fingerprint(changed)["mine"] != first["mine"]
