"""Tasks from files: columns, scoring, and prompts that are too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rldecoder.errors import BadInputError
from rldecoder.evals.external import Question, answer_questions, read_questions, score_answer
from rldecoder.lm.frozen import FrozenLM


@pytest.mark.parametrize(
    ("metric", "completion", "answers", "score"),
    [
        ("exact_match", " The Red Barn.\nmore", ("red barn",), 1.0),
        ("exact_match", "a red barn door", ("red barn",), 0.0),
        ("first_word", " Yes, because it is.", ("yes",), 1.0),
        ("first_word", "", ("yes",), 0.0),
        ("f1", "red barn door", ("the red barn", "zzz"), 0.8),
        ("f1", "nothing alike", ("red barn",), 0.0),
        ("number", "5 + 7 = 12. So #### 1,012", ("1012",), 1.0),
        ("number", "it is 12.0 apples", ("12",), 1.0),
        ("number", "no idea", ("12",), 0.0),
        ("number", "12", ("twelve",), 0.0),
    ],
)
def test_scores(metric: Any, completion: str, answers: tuple[str, ...], score: float) -> None:
    assert score_answer(metric, completion, answers) == pytest.approx(score)


def test_only_the_test_split_is_read(tmp_path: Path) -> None:
    path = tmp_path / "task.parquet"
    pq.write_table(
        pa.table(
            {
                "split": ["train", "test", "test", "dev"],
                "question": ["a?", "b?", "c?", "d?"],
                "passage": ["", "About b.", "", ""],
                "answer": [True, True, False, True],
            }
        ),
        path,
    )
    found = read_questions(path, 2)
    assert found == [
        Question("About b.\n\nQuestion: b?\nAnswer:", ("yes",)),
        Question("Question: c?\nAnswer:", ("no",)),
    ]


def test_a_file_that_is_no_task(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(BadInputError, match="`question`"):
        read_questions(path, 1)


@pytest.mark.parametrize("name", ["gsm8k", "boolq", "squad_v1.1_subset"])
def test_real_files_load(shared_data: Path, name: str) -> None:
    found = read_questions(shared_data / "tasks" / f"{name}.parquet", 20)
    assert len(found) == 20
    assert all(question.answers and question.answers[0] for question in found)


def test_long_prompts_leave_room_for_the_answer(tiny_lm_dir: Path) -> None:
    lm = FrozenLM.load(tiny_lm_dir)
    seen: list[tuple[int, int]] = []

    def generate(*, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        seen.append(tuple(input_ids.shape))
        return torch.cat([input_ids, input_ids[:, :max_new_tokens]], dim=1)

    questions = [Question("word " * 3000, ("x",)), Question("short", ("x",))]
    out = answer_questions(
        generate, questions, lm.tokenizer, max_new_tokens=5, context_length=64, batch_size=1
    )
    assert len(out) == 2
    assert seen[0] == (1, 59)
