"""Tasks in the columns that public sets have, in every kind of file; and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rldecoder.config.tasks import FileTask, Metric
from rldecoder.errors import BadInputError
from rldecoder.evals.file_tasks import FilePrompts
from rldecoder.evals.prompts import score
from rldecoder.evals.task_rows import read_task


@pytest.fixture(scope="module")
def tokenizer(tiny_lm_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_lm_dir, local_files_only=True)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def golds(folder: Path, answer: Any, column: str = "answer") -> tuple[str, ...]:
    (row,) = read_task(write(folder, {"question": "q", column: answer}), Counter())
    return row.answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("5 + 5 = <<5+5=10>>10 things.\n#### 1,010", ("1,010",)),
        ("#### -3 ", ("-3",)),
        ("see #### no end\nof it", ("see #### no end\nof it",)),
        ({"text": ["Port", "the Port"], "answer_start": [3, 3]}, ("Port", "the Port")),
        ([{"text": "Port", "answer_start": 3}], ("Port",)),
        ({"value": "Port", "aliases": ["Harbour"], "type": "x"}, ("Port", "Harbour")),
        (True, ("yes",)),
        ("False", ("False", "no")),
        (42.0, ("42",)),
        ([None, " ", "x"], ("x",)),
        ([1, 2.5], ("1", "2.5")),
    ],
)
def test_forms_of_answers(tmp_path: Path, answer: Any, expected: tuple[str, ...]) -> None:
    assert golds(tmp_path, answer) == expected


def test_hub_forms_from_parquet_to_a_score(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    solutions = [f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}" for i in range(40)]
    answers = [{"text": [f"Port{i}", f"port {i}"], "answer_start": [9, 9]} for i in range(40)]
    questions = [f"What of {i}?" for i in range(40)]
    stories = [f"It sails to Port{i}." for i in range(40)]
    gsm8k, squad = tmp_path / "gsm8k.parquet", tmp_path / "squad.parquet"
    pq.write_table(pa.table({"question": questions, "answer": solutions}), gsm8k)
    pq.write_table(pa.table({"context": stories, "question": questions, "answers": answers}), squad)
    task = FileTask(name="gsm8k", path=gsm8k, metric="number", shots=1)
    (prompt,) = FilePrompts(task, tokenizer).make("test", 1, 0)
    number = int(prompt.prompt.rsplit("What of ", 1)[1].split("?")[0])
    assert score(prompt, f"so {number + 1}") == 1.0
    assert score(prompt, f"so {number}") == 0.0
    shown = prompt.prompt.split("Answer:")[1]
    assert "####" in shown  # the working, without calculator annotations
    assert "<<" not in shown
    task = FileTask(name="squad", path=squad, metric="f1")
    (prompt,) = FilePrompts(task, tokenizer).make("test", 1, 0)
    assert prompt.prompt.startswith("It sails to Port")
    assert score(prompt, prompt.prompt.split("sails to ")[1].split(".")[0]) == 1.0


@pytest.mark.parametrize("suffix", ["csv", "json", "tsv"])
def test_other_kinds_of_files(tmp_path: Path, suffix: str) -> None:
    path, row = tmp_path / f"task.{suffix}", {"question": "Is it?", "answer": "True"}
    mark = "\t" if suffix == "tsv" else ","
    text = json.dumps([row]) if suffix == "json" else f"question{mark}answer\nIs it?{mark}True\n"
    path.write_text(text)
    (found,) = read_task(path, Counter())
    assert (found.question, found.answers) == ("Is it?", ("True", "yes"))


def test_rows_that_ask_nothing_are_counted(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answers": {"text": [], "answer_start": []}},
        {"question": None, "answers": ["x"]},
        {"question": "q", "answers": [float("nan")]},
        {"question": "fine", "answers": ["x"]},
        {"question": "caf", "answers": ["x"]},
    ]
    path = write(tmp_path, *rows)
    path.write_bytes(path.read_bytes().replace(b"caf", b"caf\xe9"))
    left_out: Counter[str] = Counter()
    assert [row.question for row in read_task(path, left_out)] == ["fine"]
    assert left_out == {"without an answer": 2, "without a question": 1, "not UTF-8": 1}
    with pytest.raises(BadInputError, match=r"no question with an answer.*2 without an answer"):
        read_task(write(tmp_path, rows[0], rows[2]), Counter())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Question": "q", "Answer": "x"}, "columns Question, Answer"),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "multiple choice"),
        ({"question": "q", "context": {"title": ["x"]}, "answer": "x"}, "`context` holds dict"),
        ({"question": ["q"], "answer": "x"}, "`question` holds list"),
        ({"question": "q", "answer": {"span": "x"}}, "not known: {'span': 'x'}"),
        ({"question": "q", "answer": "x", "split": "held-out"}, "names a split 'held-out'"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, row: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = FileTask(name="mine", path=write(tmp_path, row))
    with pytest.raises(BadInputError, match=message):
        FilePrompts(task, tokenizer)


@pytest.mark.parametrize(
    ("metric", "answer"),
    [
        ("number", "twelve"),
        ("number", "12 or 13"),
        ("f1", "two\nlines"),
        ("exact_match", "two\nlines"),
    ],
)
def test_a_task_whose_own_answer_cannot_score(
    tmp_path: Path, metric: Metric, answer: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    fine = {"question": "p", "answer": "12"}
    path = write(tmp_path, fine, {"question": "q", "answer": answer})
    with pytest.raises(BadInputError, match=r"1 of 2 answers.*cannot be right.*The first is"):
        FilePrompts(FileTask(name="mine", path=path, metric=metric), tokenizer)
    write(tmp_path, fine)
    assert FilePrompts(FileTask(name="mine", path=path, metric=metric), tokenizer).left_out == {}


def test_split_names_in_any_case(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"question": f"q{i}", "answer": "x", "split": "Test"} for i in range(3)]
    task = FileTask(name="mine", path=write(tmp_path, *rows))
    assert len(FilePrompts(task, tokenizer).make("test", 3, 0)) == 3
