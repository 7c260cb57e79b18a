"""Frozen model and decoders side by side: on the same prompts, and on the same held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import RootModel

from rldecoder.decoder.faithfulness import Faithfulness
from rldecoder.evals.statistics import bootstrap_mean_ci, paired_bootstrap_pvalue, wilson_interval
from rldecoder.schemas import JsonFile, JsonRecord, table_schema

FROZEN, SUPERVISED, RL = "frozen", "supervised", "rl"
"""The models that are compared."""


class Answer(NamedTuple):
    """What a model said to one prompt."""

    task: str
    model: str
    prompt_index: int
    answer: str
    """What would have been right."""
    completion: str
    score: float
    """0 to 1."""


ANSWERS = table_schema(Answer)
"""One row a prompt and model: an `Answer`."""


class TaskScore(JsonRecord):
    """A model on all prompts of a task, with 95 % intervals."""

    task: str
    model: str
    n: int
    """Prompts."""
    score: float
    """Mean, 0 to 1."""
    ci_low: float
    ci_high: float
    drop: float
    """The frozen model's score minus the model's on the same prompts; 0 for the frozen model."""
    drop_low: float
    """Of its paired bootstrap interval."""
    drop_high: float


TASK_SCORES = table_schema(TaskScore)
"""One row a task and model: a `TaskScore`."""


class FaithfulnessTable(JsonFile, RootModel[dict[str, dict[str, Faithfulness]]]):
    """Each decoder against the frozen model, by split and model."""

    def __getitem__(self, split: str) -> dict[str, Faithfulness]:
        return self.root[split]


def score_tasks(answers: Sequence[Answer], resamples: int, seed: int) -> list[TaskScore]:
    """Every model's score on every task, and its drop against the frozen model.

    Args:
        answers: of all models to the same prompts, each model's in the same order.
        resamples, seed: of the bootstraps.
    """
    points: dict[tuple[str, str], list[float]] = {}
    for answer in answers:
        points.setdefault((answer.task, answer.model), []).append(answer.score)

    scores = []
    for (task, model), values in sorted(points.items()):
        if set(values) <= {0.0, 1.0}:
            low, high = wilson_interval(sum(values), len(values))
        else:  # partial credit (F1) is no proportion
            _, low, high = bootstrap_mean_ci(values, resamples=resamples, seed=seed)
        drop = paired_bootstrap_pvalue(points[task, FROZEN], values, resamples=resamples, seed=seed)
        scores.append(
            TaskScore(
                task=task, model=model, n=len(values), score=float(np.mean(values)), ci_low=low,
                ci_high=high, drop=drop.difference, drop_low=drop.low, drop_high=drop.high,
            )
        )  # fmt: skip
    return scores
