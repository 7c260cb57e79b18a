"""The stage on the debug run's artifacts, and tasks by file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rldecoder import Run
from rldecoder.artifacts.catalogue import CATALOGUE, Evaluation
from rldecoder.config import explain
from rldecoder.config.explain import EvaluateConfig, HarnessConfig
from rldecoder.config.run import RunConfig
from rldecoder.config.tasks import FileTask
from rldecoder.dashboard.build import harness_table
from rldecoder.errors import BadInputError
from rldecoder.evals import answer_shards
from rldecoder.evals.comparison import ANSWERS, TASK_SCORES
from rldecoder.evals.harness_tasks import write_tasks
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.evals.targets import TARGETS
from rldecoder.executors.local import LocalExecutor
from rldecoder.seeds import derive_seed
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import EvaluateInputs
from rldecoder.stages.table import stage_named
from tests.executors.elsewhere import Elsewhere
from tests.stages.published import published

STAGE = stage_named(Evaluation.stage)


@pytest.fixture(scope="module")
def inputs(run: Run) -> EvaluateInputs:
    return run.inputs(EvaluateInputs)


@pytest.fixture(scope="module")
def evaluation(run: Run) -> Evaluation:
    """What the debug run published."""
    return run.artifact(Evaluation)


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
@pytest.mark.parametrize("executor", [LocalExecutor(), Elsewhere()])
def test_tasks_by_file_and_missing_files(
    inputs: EvaluateInputs,
    evaluation: Evaluation,
    config: RunConfig,
    context: Callable[..., StageContext],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    executor: LocalExecutor,
) -> None:
    """Also where others answer, who need not see the files."""
    monkeypatch.setattr(answer_shards, "SHARD_PROMPTS", 1)
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
    ctx = replace(ctx, executor=executor)
    output = STAGE.run(inputs, changed, ctx)
    assert output.reasons == ("task files not found: gone",)
    rows = published(Evaluation, ctx.out).tasks.to_pylist()
    assert sum(row["task"] == "mine" for row in rows) == 3
    # The other tasks are untouched by the file.
    for row in evaluation.tasks.to_pylist():
        assert row in rows
    answers = published(Evaluation, ctx.out).answers.to_pylist()
    assert [row for row in answers if row["task"] != "mine"] == evaluation.answers.to_pylist()
    first = STAGE.fingerprint(changed)
    assert first["gone"] == "missing"
    path.write_bytes(path.read_bytes() + b" ")
    assert STAGE.fingerprint(changed)["mine"] != first["mine"]


@pytest.mark.slow
def test_the_harness_asks_the_same_models(
    inputs: EvaluateInputs,
    evaluation: Evaluation,
    config: RunConfig,
    context: Callable[..., StageContext],
    tmp_path: Path,
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    prompts = [
        TaskPrompt("mine", "test", i, f"Is {i} one?", "no", "first_word", 2) for i in range(3)
    ]
    write_tasks({"mine": prompts}, theirs)
    asked = HarnessConfig(tasks=("cloze", "mine_choices"), include=(theirs,))
    changed = config.evaluate.model_copy(update={"harness": asked})
    ctx = context("harness", seed=derive_seed(config.seed, STAGE.name))
    output = STAGE.run(inputs, changed, ctx)

    found = published(Evaluation, ctx.out)
    assert found.harness is not None
    systems = ("frozen", "spliced", "supervised", "rl")
    by_key = {(one.task, one.system): one for one in found.harness.scores}
    assert set(by_key) == {(task, name) for task in asked.tasks for name in systems}
    rows = {(row["task"], row["model"]): row["score"] for row in evaluation.tasks.to_pylist()}
    for name in systems:
        one = by_key["cloze", name]
        assert one.ours == rows.get(("cloze", name))
        assert one.delta == pytest.approx(one.value - by_key["cloze", "frozen"].value)
        assert (by_key["mine_choices", name].n, by_key["mine_choices", name].ours) == (3, None)
        assert (
            output.metrics[f"lm_eval_mine_choices_acc_{name}"] == by_key["mine_choices", name].value
        )
    assert found.tasks.equals(evaluation.tasks)

    # Shown with its standard errors; what the debug run published has no such table.
    table = harness_table(found.harness)
    assert table is not None
    (row,) = [one for one in table.rows if one[:3] == ("mine_choices", "acc", "rl")]
    acc = by_key["mine_choices", "rl"]
    assert row[4:6] == (f"{acc.value:.3f}", f"{acc.stderr:.3f}")
    assert harness_table(evaluation.harness) is None


def test_what_the_harness_reads_is_in_the_digest(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asking(**values: object) -> EvaluateConfig:
        harness = {"tasks": "cloze", "include": [str(tmp_path)]} | values
        changed = config.evaluate.model_dump() | {"harness": harness}
        return EvaluateConfig.model_validate(changed)

    assert "harness" not in config.evaluate.digest_fields()
    assert STAGE.fingerprint(config.evaluate) == {}
    assert "include" not in asking().digest_fields()["harness"]
    (tmp_path / "one.yaml").write_text("task: one")
    first = STAGE.fingerprint(asking())
    assert set(first) == {"harness-0-one.yaml", "lm-eval"}
    (tmp_path / "one.yaml").write_text("task: two")
    assert STAGE.fingerprint(asking()) != first
    with pytest.raises(BadInputError, match="There is no folder"):
        STAGE.fingerprint(asking(include=[str(tmp_path / "gone")]))
    monkeypatch.setattr(explain, "find_spec", lambda name: None)
    with pytest.raises(BadInputError, match="lm_eval is not installed"):
        STAGE.fingerprint(asking())
