"""Scores of labels in words, answered by a language model.

Detection and fuzzing (2410.13928), and where they are asked for the intruder task and simulation.
The windows come from text that the labeler has not seen. Every question without a usable answer
counts as wrong for all of its windows; a label that does not exist scores 0, as for predicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rldecoder.config.llm import LlmConfig
from rldecoder.interp.corpus import Firings
from rldecoder.interp.llm.backends import ChatRequest
from rldecoder.interp.llm.intruder import Group, draw_groups, judged_intruder
from rldecoder.interp.llm.items import Item, ItemSampler, balanced
from rldecoder.interp.llm.parsing import (
    ACTIVATIONS_SCHEMA,
    ANSWERS_SCHEMA,
    CHOICE_SCHEMA,
    parse_activations,
    parse_answers,
    parse_choice,
)
from rldecoder.interp.llm.prompts import judge_prompt
from rldecoder.interp.llm.session import Parsed, Question, Session
from rldecoder.interp.llm.simulation import Window, draw_windows, judged_simulation
from rldecoder.interp.records import JudgedScores

KINDS = ("detection", "fuzzing")
"""Asked about every label, in one question each; the judge's gate tries these."""
ACTIVATION_TOKENS = 2
"""What a guessed activation and its comma take of an answer, usually."""
Place = tuple[str, int]
"""Which question about a label: its kind, and its number within that."""


class Case(NamedTuple):
    """One label against one latent, with the windows that decide."""

    latent: int
    label: str | None
    items: dict[str, list[Item]]
    """By kind asked for; empty where the text has too few."""
    active_share: float
    """Share of the split's windows in which the latent fires."""
    groups: Sequence[Group] = ()
    """For the intruder task, a question each."""
    windows: Sequence[Window] = ()
    """For simulation, a question each."""

    @property
    def num_questions(self) -> int:
        """Questions that the judge is asked about it."""
        if self.label is None:
            return 0
        return sum(map(bool, self.items.values())) + len(self.groups) + len(self.windows)


class Judge:
    """Scores labels in words; `on_answer` is called after each answer, for progress."""

    def __init__(
        self, session: Session, config: LlmConfig, on_answer: Callable[[], None] = lambda: None
    ) -> None:
        self._session, self._config, self._on_answer = session, config, on_answer

    def score(
        self, sampler: ItemSampler, cases: Sequence[Case], purpose: str = ""
    ) -> list[JudgedScores]:
        """Scores of all cases, in their order. Raises what `Session.ask_all` raises."""
        asked = {
            (number, place): question
            for number, case in enumerate(cases)
            for place, question in self.questions(sampler, case, purpose).items()
        }
        found = self._session.ask_all(list(asked.values()), self._on_answer)
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
        if case.label is None:
            return {}
        out: dict[Place, Question[Any]] = {}
        base = ChatRequest("", case.latent, (), self._config.judge_tokens, ANSWERS_SCHEMA)
        for kind in KINDS:
            items = case.items.get(kind)
            if items:
                texts = [sampler.show(item) for item in items]
                request = base._replace(
                    purpose=f"{purpose}{kind}", messages=judge_prompt(kind, case.label, texts)
                )
                out[kind, 0] = Question(request, partial(parse_answers, count=len(items)))
        for number, group in enumerate(case.groups):
            texts = [sampler.show(item) for item in group.windows]
            request = base._replace(
                purpose=f"{purpose}intruder",
                messages=judge_prompt("intruder", case.label, texts),
                schema=CHOICE_SCHEMA,
            )
            out["intruder", number] = Question(request, partial(parse_choice, count=len(texts)))
        for number, window in enumerate(case.windows):
            texts = sampler.tokens(window.cells)
            request = base._replace(
                purpose=f"{purpose}simulation",
                messages=judge_prompt("simulation", case.label, texts),
                schema=ACTIVATIONS_SCHEMA,
                expected_tokens=ACTIVATION_TOKENS * len(texts),
            )
            out["simulation", number] = Question(
                request, partial(parse_activations, count=len(texts))
            )
        return out

    def _failed(self) -> JudgedScores:
        """Of a label that does not exist."""
        return JudgedScores(
            detection=0.0,
            fuzzing=0.0,
            window_precision=0.0,
            window_recall=0.0,
            window_f1=0.0,
            questions=0,
            failures=0,
            intruder=0.0 if self._config.intruder_questions else None,
            simulation=0.0 if self._config.simulation_windows else None,
        )


def make_cases(
    sampler: ItemSampler,
    firings: Firings,
    labels: Sequence[str | None],
    seed: int,
    kinds: Sequence[str] = KINDS,
    intruder_questions: int = 0,
    simulation_windows: int = 0,
) -> list[Case]:
    """One case a row of `firings`; the windows of a latent do not depend on the other rows.

    Args:
        intruder_questions, simulation_windows: as in LlmConfig.
    """
    inside = firings.within(sampler.text.valid)
    cases = []
    for row, label in enumerate(labels):
        latent = int(inside.latents[row])
        cells, acts = inside.row(row)
        fires = cells.astype(np.int64)
        # Negative ids stand for planted features; a seed sequence takes none.
        rng = np.random.default_rng([seed, latent < 0, abs(latent)])
        draw = {"detection": sampler.detection, "fuzzing": sampler.fuzzing}
        items = {kind: draw[kind](fires, acts, rng) for kind in kinds}
        groups = draw_groups(sampler, fires, acts, intruder_questions, rng)
        windows = draw_windows(sampler, fires, acts, simulation_windows, rng)
        share = sampler.active_share(fires)
        cases.append(Case(latent, label, items, share, groups, windows))
    return cases


def _scores(case: Case, answers: dict[Place, Parsed[Any]]) -> JudgedScores:
    values = {place: parsed.value for place, parsed in answers.items()}
    by_kind: dict[str, float | None] = dict.fromkeys(KINDS)
    windows = Windows(None, None, None)
    for kind in KINDS:
        if (kind, 0) not in values:
            continue
        items = case.items[kind]
        value = values[kind, 0]
        said: list[bool | None] = [None] * len(items) if value is None else value
        by_kind[kind] = balanced(items, said)
        if kind == "detection":
            windows = _windows(items, said, case.active_share)
    return JudgedScores(
        detection=by_kind["detection"],
        fuzzing=by_kind["fuzzing"],
        window_precision=windows.precision,
        window_recall=windows.recall,
        window_f1=windows.f1,
        questions=len(values),
        failures=sum(value is None for value in values.values()),
        intruder=judged_intruder(
            case.groups, [values["intruder", n] for n in range(len(case.groups))]
        ),
        simulation=judged_simulation(
            case.windows, [values["simulation", n] for n in range(len(case.windows))]
        ),
    )


class Windows(NamedTuple):
    """A label's answers, estimated for all windows of the split."""

    precision: float | None
    recall: float | None
    f1: float | None


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
