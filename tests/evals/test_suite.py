"""Generated tasks and files behind one call, and prompts that do not fit the model."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rldecoder.config.tasks import FileTask
from rldecoder.errors import BadInputError
from rldecoder.evals.prompts import make_prompts
from rldecoder.evals.suite import TaskSuite, check_lengths
from rldecoder.lm.frozen import FrozenLM


@pytest.fixture
def lm(tiny_lm_dir: Path) -> FrozenLM:
    return FrozenLM.load(tiny_lm_dir)


@pytest.fixture
def task(tmp_path: Path) -> FileTask:
    path = tmp_path / "task.parquet"
    questions = ["a?", "b?", "c?"]
    table = {"split": ["test"] * 3, "question": questions, "answer": ["x"] * 3}
    pq.write_table(pa.table(table), path)
    return FileTask(name="mine", path=path, max_new_tokens=4)


def test_generated_tasks_and_files_are_asked_alike(lm: FrozenLM, task: FileTask) -> None:
    suite = TaskSuite(("cloze",), (task,), lm)
    assert suite.names == ["cloze", "mine"]
    assert suite.make("cloze", "test", 2, 0) == make_prompts("cloze", "test", 2, 0)
    assert [prompt.task for prompt in suite.make("mine", "test", 2, 0)] == ["mine", "mine"]
    assert len(suite.make("mine", "test", 9, 0, fewer=True)) == 3
    with pytest.raises(BadInputError, match="9 were asked for"):
        suite.make("mine", "test", 9, 0)


def test_files_keep_within_the_models_context(
    lm: FrozenLM, task: FileTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm.model.config, "n_positions", 5)
    with pytest.raises(BadInputError, match="longer than 1 tokens"):
        TaskSuite((), (task,), lm).make("mine", "test", 1, 0)


def test_generated_prompts_that_do_not_fit_are_refused(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts("cloze", "train", 2, 0)
    check_lengths(lm, prompts)
    monkeypatch.setattr(lm.model.config, "n_positions", 20)
    with pytest.raises(BadInputError, match="context is 20 tokens"):
        check_lengths(lm, prompts)
