"""Detection and fuzzing of labels in words (2410.13928), answered by a language model.

The windows come from text that the labeler has not seen. Every question without a usable answer
counts as wrong for all of its windows; a label that does not exist scores 0, as for predicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from rldecoder.config.llm import LlmConfig
from rldecoder.interp.corpus import Firings
from rldecoder.interp.llm.backends import ChatRequest
from rldecoder.interp.llm.items import Item, ItemSampler, balanced
from rldecoder.interp.llm.parsing import ANSWERS_SCHEMA, parse_answers
from rldecoder.interp.llm.prompts import judge_prompt
from rldecoder.interp.llm.session import Question, Session

KINDS = ("detection", "fuzzing")


class JudgeScores(NamedTuple):
    """Scores of one label in words; None where there are too few windows of a kind."""

    detection: float | None
    """Balanced accuracy over the windows asked about."""
    fuzzing: float | None
    """The same for marks."""
    window_precision: float | None
    """Share of the split's windows named by the label in which the latent fires: estimated from
    the detection answers and the true share of active windows."""
    questions: int
    """Questions asked about it: one a kind."""
    failures: int
    """Of these, without a usable answer."""
    window_recall: float | None = None
    """Share of the split's active windows that the label names."""
    window_f1: float | None = None
    """Harmonic mean of recall and precision over windows."""


class Case(NamedTuple):
    """One label against one latent, with the windows that decide."""

    latent: int
    label: str | None
    items: dict[str, list[Item]]
    """By kind asked for; empty where the text has too few."""
    active_share: float
    """Share of the split's windows in which the latent fires."""


class Judge:
    """Scores labels in words; `on_answer` is called after each answer, for progress."""

    def __init__(
        self, session: Session, config: LlmConfig, on_answer: Callable[[], None] = lambda: None
    ) -> None:
        self._session, self._config, self._on_answer = session, config, on_answer

    def score(
        self, sampler: ItemSampler, cases: Sequence[Case], purpose: str = ""
    ) -> list[JudgeScores]:
        """Scores of all cases, in their order. Raises what `Session.ask_all` raises."""
        places: list[tuple[int, str]] = []
        questions = []
        for number, case in enumerate(cases):
            for kind, question in self.questions(sampler, case, purpose).items():
                places.append((number, kind))
                questions.append(question)
        found = self._session.ask_all(questions, self._on_answer)
        answers = dict(zip(places, found, strict=True))
        out = []
        for number, case in enumerate(cases):
            values: dict[str, list[bool | None]] = {}
            failures = 0
            for kind in KINDS:
                parsed = answers.get((number, kind))
                if parsed is None:
                    continue
                failures += parsed.value is None
                missing: list[bool | None] = [None] * len(case.items[kind])
                values[kind] = missing if parsed.value is None else list(parsed.value)
            out.append(_scores(case, values, failures))
        return out

    def questions(
        self, sampler: ItemSampler, case: Case, purpose: str = ""
    ) -> dict[str, Question[list[bool]]]:
        """What would be asked about a case, by kind; nothing is sent."""
        if case.label is None:
            return {}
        out = {}
        for kind in KINDS:
            items = case.items.get(kind)
            if items:
                messages = judge_prompt(kind, case.label, [sampler.show(item) for item in items])
                request = ChatRequest(
                    f"{purpose}{kind}", case.latent, messages, self._config.judge_tokens,
                    ANSWERS_SCHEMA,
                )  # fmt: skip
                out[kind] = Question(request, partial(parse_answers, count=len(items)))
        return out


def make_cases(
    sampler: ItemSampler,
    firings: Firings,
    labels: Sequence[str | None],
    seed: int,
    kinds: Sequence[str] = KINDS,
) -> list[Case]:
    """One case a row of `firings`; the windows of a latent do not depend on the other rows."""
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
        cases.append(Case(latent, label, items, sampler.active_share(fires)))
    return cases


def _scores(case: Case, answers: dict[str, list[bool | None]], failures: int) -> JudgeScores:
    if case.label is None:
        return JudgeScores(0.0, 0.0, 0.0, 0, 0, 0.0, 0.0)
    by_kind = {
        kind: balanced(case.items[kind], answers[kind]) if kind in answers else None
        for kind in KINDS
    }
    windows = Windows(None, None, None)
    if "detection" in answers:
        windows = _windows(case.items["detection"], answers["detection"], case.active_share)
    return JudgeScores(
        by_kind["detection"], by_kind["fuzzing"], windows.precision, len(answers), failures,
        windows.recall, windows.f1,
    )  # fmt: skip


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
