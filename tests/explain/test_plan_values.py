"""The values of the plan's targets, from records small enough to know the answers."""

from __future__ import annotations

from rldecoder.evals.comparison import Answer, score_tasks
from rldecoder.explain.plan_values import task_drop


def answers(model: str, scores: list[float]) -> list[Answer]:
    return [Answer("t", model, i, "a", "b", score) for i, score in enumerate(scores)]


def test_drop_is_the_paired_difference_to_the_frozen_model() -> None:
    scores = score_tasks(
        answers("frozen", [1, 1, 1, 0]) + answers("rl", [1, 0, 1, 0]), resamples=200, seed=0
    )
    found = {row.model: row for row in scores}
    assert found["frozen"].drop == 0.0
    assert found["rl"].drop == 0.25
    assert found["rl"].ci_low < 0.5 < found["rl"].ci_high
    measured = task_drop(scores, 0.03)
    assert measured.value == 0.25


def test_nothing_to_drop_is_unknown_not_met() -> None:
    scores = score_tasks(answers("frozen", [0, 0]) + answers("rl", [0, 0]), resamples=200, seed=0)
    assert task_drop(scores, 0.03).value is None
