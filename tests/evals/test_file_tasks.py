"""Tasks from files: columns, splits that never touch, worked examples, and what is too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rldecoder.config.tasks import FileTask
from rldecoder.errors import BadInputError
from rldecoder.evals.file_tasks import FilePrompts
from rldecoder.evals.prompts import SPLITS, score
from rldecoder.lm.frozen import FrozenLM


def write(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def some(tmp_path: Path, count: int = 40, **settings: Any) -> FileTask:
    """`count` training questions and three test questions."""
    names = [f"How many are {i}?" for i in range(count)] + ["test a?", "test b?", "test c?"]
    path = write(
        tmp_path / "task.parquet",
        split=["train"] * count + ["test"] * 3,
        question=names,
        answer=[str(i) for i in range(count + 3)],
    )
    return FileTask(name="mine", path=path, **{"metric": "number", "max_new_tokens": 4} | settings)


def test_the_form_of_a_prompt(tmp_path: Path, lm: FrozenLM) -> None:
    path = write(
        tmp_path / "task.parquet",
        split=["train", "test", "dev", "test"],
        question=["a?", "b?", "c?", "d?"],
        passage=["", "About b.", "", ""],
        answers=[["x"], ["Yes", "yep"], ["no"], []],
    )
    task = FileTask(name="mine", path=path, metric="first_word", max_new_tokens=7)
    found = FilePrompts(task, lm.tokenizer).make("test", 9, 0, fewer=True)
    by_text = {prompt.prompt: prompt for prompt in found}
    # The question without an answer is left out.
    assert set(by_text) == {"About b.\n\nQuestion: b?\nAnswer:", "Question: c?\nAnswer:"}
    prompt = by_text["About b.\n\nQuestion: b?\nAnswer:"]
    assert (prompt.task, prompt.split, prompt.max_new_tokens) == ("mine", "test", 7)
    assert score(prompt, " yep, certainly") == 1.0
    assert score(prompt, " nope") == 0.0


def test_truth_values_are_yes_and_no(tmp_path: Path, lm: FrozenLM) -> None:
    path = write(
        tmp_path / "task.parquet", split=["test"] * 2, question=["a", "b"], answer=[True, False]
    )
    task = FileTask(name="mine", path=path, metric="first_word")
    found = FilePrompts(task, lm.tokenizer).make("test", 2, 0)
    assert sorted(prompt.answer for prompt in found) == ["no", "yes"]


def test_worked_examples_come_first_and_are_asked_nowhere(tmp_path: Path, lm: FrozenLM) -> None:
    names = [f"q{i}" for i in range(30)]
    path = write(
        tmp_path / "task.parquet",
        split=["train"] * 30,
        question=names,
        answer=[f"It is\n<<1+1=2>>two #### {i}" for i in range(30)],
        final_answer=[str(i) for i in range(30)],
    )
    task = FileTask(name="mine", path=path, metric="number", shots=2)
    prompts = FilePrompts(task, lm.tokenizer).make("train", 60, 0)
    (examples,) = {prompt.prompt.rsplit("Question:", 1)[0] for prompt in prompts}
    assert examples.count("Question:") == 2
    assert examples.count(" It is two #### ") == 2
    asked = {prompt.prompt.rsplit("Question: ", 1)[1].split("\n")[0] for prompt in prompts}
    shown = {part.split("\n")[0] for part in examples.split("Question: ")[1:]}
    assert len(shown) == 2
    assert not shown & asked
    assert all(score(prompt, f" So #### {prompt.answer}") == 1.0 for prompt in prompts)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([*"abcdefgh"]),
            st.sampled_from(["", "P one", "p  ONE", "P two"]),
            st.sampled_from(["train", "test", "dev", "validation"]),
        ),
        min_size=1,
        max_size=30,
    ),
    named=st.booleans(),
)
def test_no_passage_and_no_question_is_in_two_splits(
    rows: list[tuple[str, str, str]], named: bool, tiny_lm_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    columns: dict[str, list[Any]] = {
        "question": [q for q, _, _ in rows],
        "passage": [p for _, p, _ in rows],
        "answer": ["x"] * len(rows),
    }
    if named:
        columns["split"] = [split for _, _, split in rows]
    path = write(tmp_path_factory.mktemp("task") / "task.parquet", **columns)
    prompts = FilePrompts(FileTask(name="mine", path=path), FrozenLM.load(tiny_lm_dir).tokenizer)
    seen: dict[str, str] = {}
    for split in SPLITS:
        try:
            found = prompts.make(split, 200 if split == "train" else 999, 0, fewer=True)
        except BadInputError:
            continue
        for prompt in found:
            passage, question = prompt.prompt.rsplit("Question: ", 1)
            group = " ".join((passage or question).casefold().split())
            assert seen.setdefault(group, split) == split
    if named:
        tested = {q for q, p, split in rows if split != "train" and not p}
        assert all(seen[f"{q} answer:"] == "test" for q in tested)


def test_deterministic_and_without_repetition(tmp_path: Path, lm: FrozenLM) -> None:
    prompts = FilePrompts(some(tmp_path), lm.tokenizer)
    first = prompts.make("train", 20, 3)
    assert prompts.make("train", 50, 3)[:20] == first
    assert len({prompt.prompt for prompt in first}) == 20
    assert prompts.make("train", 20, 4) != first
    assert [prompt.index for prompt in first] == list(range(20))


def test_held_out_prompts_run_out(tmp_path: Path, lm: FrozenLM) -> None:
    prompts = FilePrompts(some(tmp_path), lm.tokenizer)
    assert len(prompts.make("test", 9, 0, fewer=True)) == 3
    with pytest.raises(BadInputError, match="has 3 test prompts; 9 were asked for"):
        prompts.make("test", 9, 0)


def test_what_is_too_long_is_left_out_and_said(tmp_path: Path, lm: FrozenLM) -> None:
    with pytest.raises(BadInputError, match="3 others are longer than 2 tokens"):
        FilePrompts(some(tmp_path, max_prompt_tokens=2), lm.tokenizer).make("test", 3, 0)
    # The model's context bounds prompt and answer together.
    with pytest.raises(BadInputError, match="longer than 1 tokens"):
        FilePrompts(some(tmp_path), lm.tokenizer, context_length=5).make("train", 3, 0)


def test_too_few_examples(tmp_path: Path, lm: FrozenLM) -> None:
    with pytest.raises(BadInputError, match="wants 5 worked examples"):
        FilePrompts(some(tmp_path, count=3, shots=5), lm.tokenizer)


def test_a_file_that_is_no_task(tmp_path: Path, lm: FrozenLM) -> None:
    path = write(tmp_path / "other.parquet", text=["x"])
    with pytest.raises(BadInputError, match="`question`"):
        FilePrompts(FileTask(name="mine", path=path), lm.tokenizer)


@pytest.mark.parametrize(
    ("name", "metric", "shots"),
    [("gsm8k", "number", 2), ("boolq", "first_word", 0), ("squad_v1.1_subset", "f1", 0)],
)
def test_real_files(shared_data: Path, lm: FrozenLM, name: str, metric: Any, shots: int) -> None:
    path = shared_data / "tasks" / f"{name}.parquet"
    task = FileTask(name="real", path=path, metric=metric, shots=shots, max_prompt_tokens=3000)
    prompts = FilePrompts(task, lm.tokenizer)
    found = {split: prompts.make(split, 30, 0) for split in SPLITS}
    texts = {split: {p.prompt for p in found[split]} for split in SPLITS}
    assert all(len(texts[split]) == 30 for split in SPLITS)
    assert not texts["train"] & (texts["test"] | texts["validation"])
    assert not texts["test"] & texts["validation"]
    for prompt in found["test"]:
        assert score(prompt, f" {prompt.answer}\nmore") == 1.0
        assert score(prompt, " -987654 zzz") == 0.0
