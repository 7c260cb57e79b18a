"""Answers in free text: right ones, wrong ones, and real ones of other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rldecoder import schemas
from rldecoder.evals.answers import score_answer


@pytest.mark.parametrize(
    ("metric", "completion", "answers", "score"),
    [
        ("exact_match", " The Red Barn.\nmore", ("red barn",), 1.0),
        ("exact_match", "a red barn door", ("red barn",), 0.0),
        ("exact_match", "oak", ("elm", "Oak"), 1.0),
        ("first_word", " Yes, because it is.", ("yes",), 1.0),
        ("first_word", " yesterday", ("yes",), 0.0),
        ("first_word", "", ("yes",), 0.0),
        ("f1", "red barn door", ("the red barn", "zzz"), 0.8),
        ("f1", "nothing alike", ("red barn",), 0.0),
        ("number", "5 + 7 = 12. So #### 1,012", ("1012",), 1.0),
        ("number", "it is 12.0 apples", ("12",), 1.0),
        ("number", "first 12, then 13", ("12",), 0.0),
        ("number", "no idea", ("12",), 0.0),
        ("number", "12", ("twelve",), 0.0),
        # Units, currencies, signs and separators, on both sides.
        ("number", "that is -$1,234.50 in all", ("-1234.5",), 1.0),
        ("number", "so 42 lamps", ("42 lamps",), 1.0),
        ("number", "so $42", ("$42.00",), 1.0),
        ("number", "it is \u22127", ("-7",), 1.0),
        ("number", "it is 7", ("-7",), 0.0),
        ("number", "12-5=7, from 9-7", ("7",), 1.0),
        ("number", "a half is .5", ("0.5",), 1.0),
        ("number", "points 12,13", ("13",), 1.0),
        ("number", "13", ("12 or 13",), 0.0),
        # An answer that is an article is one; an empty one is not the same.
        ("exact_match", "", ("A",), 0.0),
        ("exact_match", " a.", ("A",), 1.0),
        ("exact_match", "B", ("A",), 0.0),
        ("f1", "", ("The",), 0.0),
        ("first_word", "A, because", ("A",), 1.0),
        ("first_word", "because", ("A",), 0.0),
    ],
)
def test_scores(metric: Any, completion: str, answers: tuple[str, ...], score: float) -> None:
    assert score_answer(metric, completion, answers) == pytest.approx(score)


def test_real_solutions_of_gsm8k_are_judged_as_their_makers_did(shared_data: Path) -> None:
    """5,276 chains of thought by four models, right and wrong; the oracle is the data's own."""
    folder = shared_data / "tasks"
    solutions = schemas.read_parquet(folder / "gsm8k_model_solutions.parquet").to_pylist()
    right = [row["is_correct"] for row in solutions]
    assert 0.2 < sum(right) / len(right) < 0.8
    wrong_verdicts = [
        row["id"]
        for row in solutions
        if bool(score_answer("number", row["solution"], (row["reference"].split("A:")[-1],)))
        is not row["is_correct"]
    ]
    assert wrong_verdicts == []
