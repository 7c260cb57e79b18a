"""Scores of labels in words, answered by a language model.

What is asked, and how it is scored, is in `tasks`. The windows come from text that the labeler has
not seen. Every question without a usable answer counts as wrong for all of its windows; a label
that does not exist scores 0, as for predicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rldecoder.config.llm import LlmConfig
from rldecoder.interp.corpus import Firings
from rldecoder.interp.llm.backends import ChatRequest
from rldecoder.interp.llm.client import ChatClient, Parsed, Question
from rldecoder.interp.llm.items import Item, ItemSampler
from rldecoder.interp.llm.prompts import judge_prompt
from rldecoder.interp.llm.tasks import TASKS, said, task_counts
from rldecoder.interp.records import JudgedScores

Place = tuple[str, int]
"""Which question about a label: its task, and its number within that."""


class Case(NamedTuple):
    """One label against one latent, with the windows that decide."""

    latent: int
    label: str | None
    questions: dict[str, list[Any]]
    """By task asked for, see `tasks`; empty where the text has too few windows."""
    active_share: float
    """Share of the split's windows in which the latent fires."""

    @property
    def num_questions(self) -> int:
        """Questions that the judge is asked about it."""
        return 0 if self.label is None else sum(map(len, self.questions.values()))


class Judge:
    """Scores labels in words; `on_answer` is called after each answer, for progress."""

    def __init__(
        self, client: ChatClient, config: LlmConfig, on_answer: Callable[[], None] = lambda: None
    ) -> None:
        self._client, self._config, self._on_answer = client, config, on_answer

    def score(
        self, sampler: ItemSampler, cases: Sequence[Case], purpose: str = ""
    ) -> list[JudgedScores]:
        """Scores of all cases, in their order. Raises what `ChatClient.ask_all` raises."""
        asked = {
            (number, place): question
            for number, case in enumerate(cases)
            for place, question in self.questions(sampler, case, purpose).items()
        }
        found = self._client.ask_all(list(asked.values()), self._on_answer)
        answers: list[dict[Place, Parsed[Any]]] = [{} for _ in cases]
        for (number, place), parsed in zip(asked, found, strict=True):
            answers[number][place] = parsed
        return [
            self._failed() if case.label is None else _scores(case, answers[number])
            for number, case in enumerate(cases)
        ]

    def questions(
        self, sampler: ItemSampler, case: Case, purpose: str = ""
    ) -> dict[Place, Question[Any]]:
        """What would be asked about a case; nothing is sent."""
        out: dict[Place, Question[Any]] = {}
        for name, questions in case.questions.items() if case.label is not None else ():
            assert case.label is not None
            task = TASKS[name]
            for number, question in enumerate(questions):
                texts = task.show(sampler, question)
                request = ChatRequest(
                    f"{purpose}{name}",
                    case.latent,
                    judge_prompt(name, case.label, texts),
                    self._config.judge_tokens,
                    task.schema,
                    task.expected_tokens(len(texts)),
                )
                out[name, number] = Question(request, partial(task.parse, count=len(texts)))
        return out

    def _failed(self) -> JudgedScores:
        """Of a label that does not exist."""
        nothing = dict.fromkeys((*task_counts(self._config), *Windows._fields), 0.0)
        return JudgedScores(questions=0, failures=0, **nothing)


def make_cases(
    sampler: ItemSampler,
    firings: Firings,
    labels: Sequence[str | None],
    seed: int,
    counts: Mapping[str, int],
) -> list[Case]:
    """One case a row of `firings`; the windows of a latent do not depend on the other rows.

    Args:
        counts: how much is asked, by task.
    """
    inside = firings.within(sampler.text.valid)
    cases = []
    for row, label in enumerate(labels):
        latent = int(inside.latents[row])
        cells, acts = inside.row(row)
        fires = cells.astype(np.int64)
        # Negative ids stand for planted features; a seed sequence takes none.
        rng = np.random.default_rng([seed, latent < 0, abs(latent)])
        questions = {
            name: TASKS[name].draw(sampler, fires, acts, count, rng)
            for name, count in counts.items()
        }
        cases.append(Case(latent, label, questions, sampler.active_share(fires)))
    return cases


def _scores(case: Case, answers: Mapping[Place, Parsed[Any]]) -> JudgedScores:
    values = {
        name: [answers[name, number].value for number in range(len(questions))]
        for name, questions in case.questions.items()
    }
    scores = {
        name: TASKS[name].score(questions, values[name])
        for name, questions in case.questions.items()
    }
    windows = Windows(None, None, None)
    if detection := case.questions.get("detection"):
        items = [item for question in detection for item in question]
        windows = _windows(items, said(detection, values["detection"]), case.active_share)
    return JudgedScores(
        questions=len(answers),
        failures=sum(answer.value is None for answer in answers.values()),
        **{"detection": None, "fuzzing": None, **scores},
        **windows._asdict(),
    )


class Windows(NamedTuple):
    """A label's detection answers, estimated for all windows of the split."""

    window_precision: float | None
    window_recall: float | None
    window_f1: float | None


def _windows(items: list[Item], answers: list[bool | None], active_share: float) -> Windows:
    """Bayes: precision = hits p / (hits p + false alarms (1 - p)), recall = hits; all 0 if the
    label names no active window."""
    said = {kind: [a for i, a in zip(items, answers, strict=True) if i.truth is kind]
            for kind in (True, False)}  # fmt: skip
    recall = float(np.mean([a is True for a in said[True]]))
    hits = recall * active_share
    # No answer is a wrong answer: on a silent window, a false alarm.
    false = float(np.mean([a is not False for a in said[False]])) * (1 - active_share)
    precision = hits / (hits + false) if hits + false else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Windows(precision, recall, f1)
