"""What a reader of a label is asked: detection, fuzzing, intruder and simulation, once each.

A task draws questions about a latent, shows them, and scores the answers: those of a judge who
reads the label in words, or of a reader who applies a predicate without error (`read`).

Detection and fuzzing (2410.13928): in which of these windows does the latent fire, which marks are
where it fires? One question a label.

The intruder task, after Chang et al. 2009 (Reading tea leaves) and 2507.08473: which of these
windows is the one without the latent? There the reader sees windows alone and the score is one of
the latent. Here the label is seen too, as a predicate would be run on the same windows
(`scores.intruder_score`): it is a score of the label, which a wrong label loses.

Simulation, after Bills et al. 2023: every token's activation is guessed from the label alone, and
compared with the real ones as a predicate's are (`correlate`), but over the windows asked about,
in half of which the latent fires.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.config.llm import LlmConfig
from rldecoder.interp.llm import parsing
from rldecoder.interp.llm.items import BoolArray, Cells, Item, ItemSampler, balanced, read_exactly
from rldecoder.interp.scores import INTRUDER_WINDOWS
from rldecoder.interp.simulation import correlate

KINDS = ("detection", "fuzzing")
"""Asked about every label; the judge's gate tries these."""
ACTIVATION_TOKENS = 2
"""What a guessed activation and its comma take of an answer, usually."""
Acts = NDArray[np.float32]


@dataclass(frozen=True)
class LabelTask:
    """One kind of question about a label."""

    schema: parsing.AnswerSchema
    """JSON schema of an answer."""
    draw: Callable[[ItemSampler, Cells, Acts, int, np.random.Generator], list[Any]]
    """Questions about a latent, from where it fires, its activations there, and how much is asked
    (see `task_counts`); none if the text has too few windows."""
    show: Callable[[ItemSampler, Any], list[str]]
    """The texts of a question: of windows, or of tokens."""
    parse: Callable[..., Any]
    """The answer to `count` texts; raises MalformedAnswerError."""
    read: Callable[[Any, BoolArray], Any]
    """The answer of a reader without error; `held` [cells]: where the predicate holds."""
    score: Callable[[Sequence[Any], Sequence[Any]], float | None]
    """The label's score; an answer of None is wrong. None without questions."""
    answer_tokens: int | None = None
    """What an answer takes for each text, usually; None: nothing better is known than for all."""

    def expected_tokens(self, count: int) -> int | None:
        """How long an answer to `count` texts is, usually."""
        return None if self.answer_tokens is None else self.answer_tokens * count


def _window_task(draw: Callable[..., list[Item]]) -> LabelTask:
    """Yes or no about each of some windows, in one question: balanced accuracy.

    Args:
        draw: items of both kinds; a method of ItemSampler.
    """

    def score(
        questions: Sequence[list[Item]], answers: Sequence[list[bool] | None]
    ) -> float | None:
        items = [item for question in questions for item in question]
        return balanced(items, said(questions, answers))

    return LabelTask(
        parsing.ANSWERS_SCHEMA,
        draw=lambda *drawn: [items] if (items := draw(*drawn)) else [],
        show=lambda sampler, question: [sampler.show(item) for item in question],
        parse=parsing.parse_answers,
        read=lambda question, held: [read_exactly(item, held) for item in question],
        score=score,
    )


def said(
    questions: Sequence[list[Item]], answers: Sequence[list[bool] | None]
) -> list[bool | None]:
    """The answer about each window; None where none came."""
    out: list[bool | None] = []
    for question, answer in zip(questions, answers, strict=True):
        out += [None] * len(question) if answer is None else answer
    return out


class Group(NamedTuple):
    """INTRUDER_WINDOWS windows; the latent is strongly active in all but one, and silent there."""

    windows: list[Item]
    odd: int
    """Index of the silent one."""


def _draw_groups(
    sampler: ItemSampler, fires: Cells, acts: Acts, count: int, rng: np.random.Generator
) -> list[Group]:
    """`count` groups, each drawn anew."""
    strong, silent = sampler.strong_and_silent(fires, acts)
    if strong.size < INTRUDER_WINDOWS - 1 or not silent.size:
        return []
    groups = []
    for _ in range(count):
        windows = rng.choice(strong, INTRUDER_WINDOWS - 1, replace=False).tolist()
        odd = int(rng.integers(INTRUDER_WINDOWS))
        windows.insert(odd, int(rng.choice(silent)))
        nothing = np.zeros(0, np.int64)
        items = [Item(sampler.cells(w), nothing, n != odd) for n, w in enumerate(windows)]
        groups.append(Group(items, odd))
    return groups


def _read_group(question: Group, held: BoolArray) -> int:
    """The first window in which the predicate does not hold, or the first."""
    holds = [read_exactly(item, held) for item in question.windows]
    return holds.index(False) if False in holds else 0


def _score_groups(questions: Sequence[Group], answers: Sequence[int | None]) -> float | None:
    """Which window is the one without the latent? Accuracy corrected for chance.

    (a - 1 / k) / (1 - 1 / k), with a the share of groups whose silent window was named and k the
    windows of a group: 1 always right, 0 no better than guessing, -1 / (k - 1) never right.
    """
    if not questions:
        return None
    right = np.mean([group.odd == a for group, a in zip(questions, answers, strict=True)])
    chance = 1 / INTRUDER_WINDOWS
    return float((right - chance) / (1 - chance))


class Window(NamedTuple):
    """One window of the scored split, with what is to be guessed."""

    cells: Cells
    """Its valid cells, increasing."""
    acts: NDArray[np.float64]
    """[cells] the latent's activations, 0 where it is silent."""


def _draw_windows(
    sampler: ItemSampler, fires: Cells, acts: Acts, count: int, rng: np.random.Generator
) -> list[Window]:
    """`count` active windows and as many silent ones, a question each."""
    windows = []
    for number, _ in sampler.both_kinds(fires, acts, count, rng) if count else ():
        cells = sampler.cells(number)
        real = np.zeros(cells.size)
        inside = np.isin(fires, cells)
        real[np.searchsorted(cells, fires[inside])] = acts[inside]
        windows.append(Window(cells, real))
    return windows


def _read_strengths(question: Window, held: BoolArray) -> list[int]:
    """A guess a token; such a reader cannot know the strengths."""
    return [parsing.MAX_ACTIVATION * int(holds) for holds in held[question.cells]]


def _score_guesses(
    questions: Sequence[Window], answers: Sequence[list[int] | None]
) -> float | None:
    """How active is each token, from 0 to MAX_ACTIVATION? Correlation with the real activations.

    Over all tokens of the windows with an answer, times the share of those windows: so a window
    without a usable answer counts as one whose correlation is 0, as much as a guess that is the
    same everywhere.
    """
    if not questions:
        return None
    known = [(w.acts, a) for w, a in zip(questions, answers, strict=True) if a is not None]
    if not known:
        return 0.0
    real = np.concatenate([acts for acts, _ in known])
    guesses = np.concatenate([np.asarray(guess, np.float64) for _, guess in known])
    # Without an answer on any active window there is nothing that could be told apart.
    return (correlate(guesses, real) or 0.0) * len(known) / len(questions)


TASKS: Mapping[str, LabelTask] = {
    "detection": _window_task(ItemSampler.detection),
    "fuzzing": _window_task(ItemSampler.fuzzing),
    "intruder": LabelTask(
        parsing.CHOICE_SCHEMA,
        draw=_draw_groups,
        show=lambda sampler, question: [sampler.show(item) for item in question.windows],
        parse=parsing.parse_choice,
        read=_read_group,
        score=_score_groups,
    ),
    "simulation": LabelTask(
        parsing.ACTIVATIONS_SCHEMA,
        draw=_draw_windows,
        show=lambda sampler, question: sampler.tokens(question.cells),
        parse=parsing.parse_activations,
        read=_read_strengths,
        score=_score_guesses,
        answer_tokens=ACTIVATION_TOKENS,
    ),
}


def task_counts(config: LlmConfig) -> dict[str, int]:
    """What is asked about every label, in the order in which it is drawn: windows of each of both
    kinds for detection, fuzzing and simulation, questions for the intruder task."""
    counts = {
        "detection": config.judge_windows,
        "fuzzing": config.judge_windows,
        "intruder": config.intruder_questions,
        "simulation": config.simulation_windows,
    }
    return {name: count for name, count in counts.items() if count}
