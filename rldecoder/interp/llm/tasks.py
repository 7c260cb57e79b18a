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
from typing import Any, NamedTuple, Protocol

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


class LabelTask(Protocol):
    """One kind of question about a label."""

    schema: parsing.AnswerSchema
    """JSON schema of an answer."""

    def draw(
        self, sampler: ItemSampler, fires: Cells, acts: Acts, count: int, rng: np.random.Generator
    ) -> list[Any]:
        """Questions about a latent; none if the text has too few windows.

        Args:
            count: how much is asked; see `task_counts`.
        """
        ...

    def show(self, sampler: ItemSampler, question: Any) -> list[str]:
        """The texts of a question: of windows, or of tokens."""
        ...

    def parse(self, answer: str, count: int) -> Any:
        """The answer to `count` texts; raises MalformedAnswerError."""
        ...

    def expected_tokens(self, count: int) -> int | None:
        """How long an answer is, usually; None: nothing better is known than for all."""
        ...

    def read(self, question: Any, held: BoolArray) -> Any:
        """The answer of a reader without error; `held` [cells]: where the predicate holds."""
        ...

    def score(self, questions: Sequence[Any], answers: Sequence[Any]) -> float | None:
        """The label's score; an answer of None is wrong. None without questions."""
        ...


class WindowTask:
    """Yes or no about each of some windows: balanced accuracy.

    Args:
        draw: items of both kinds; a method of ItemSampler.
    """

    schema = parsing.ANSWERS_SCHEMA

    def __init__(self, draw: Callable[..., list[Item]]) -> None:
        self._draw = draw

    def draw(
        self, sampler: ItemSampler, fires: Cells, acts: Acts, count: int, rng: np.random.Generator
    ) -> list[list[Item]]:
        """See `LabelTask`: one question about all windows."""
        items = self._draw(sampler, fires, acts, count, rng)
        return [items] if items else []

    def show(self, sampler: ItemSampler, question: list[Item]) -> list[str]:
        """See `LabelTask`."""
        return [sampler.show(item) for item in question]

    def parse(self, answer: str, count: int) -> list[bool]:
        """See `LabelTask`."""
        return parsing.parse_answers(answer, count)

    def expected_tokens(self, count: int) -> int | None:
        """See `LabelTask`."""
        return None

    def read(self, question: list[Item], held: BoolArray) -> list[bool]:
        """See `LabelTask`."""
        return [read_exactly(item, held) for item in question]

    def score(
        self, questions: Sequence[list[Item]], answers: Sequence[list[bool] | None]
    ) -> float | None:
        """See `LabelTask`."""
        items = [item for question in questions for item in question]
        return balanced(items, said(questions, answers))


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


class IntruderTask:
    """Which window is the one without the latent? Accuracy corrected for chance.

    (a - 1 / k) / (1 - 1 / k), with a the share of groups whose silent window was named and k the
    windows of a group: 1 always right, 0 no better than guessing, -1 / (k - 1) never right.
    """

    schema = parsing.CHOICE_SCHEMA

    def draw(
        self, sampler: ItemSampler, fires: Cells, acts: Acts, count: int, rng: np.random.Generator
    ) -> list[Group]:
        """See `LabelTask`: `count` groups, each drawn anew."""
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

    def show(self, sampler: ItemSampler, question: Group) -> list[str]:
        """See `LabelTask`."""
        return [sampler.show(item) for item in question.windows]

    def parse(self, answer: str, count: int) -> int:
        """See `LabelTask`: the index of a window."""
        return parsing.parse_choice(answer, count)

    def expected_tokens(self, count: int) -> int | None:
        """See `LabelTask`."""
        return None

    def read(self, question: Group, held: BoolArray) -> int:
        """See `LabelTask`: the first window in which the predicate does not hold, or the first."""
        holds = [read_exactly(item, held) for item in question.windows]
        return holds.index(False) if False in holds else 0

    def score(self, questions: Sequence[Group], answers: Sequence[int | None]) -> float | None:
        """See `LabelTask`."""
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


class SimulationTask:
    """How active is each token, from 0 to MAX_ACTIVATION? Correlation with the real activations.

    Over all tokens of the windows with an answer, times the share of those windows: so a window
    without a usable answer counts as one whose correlation is 0, as much as a guess that is the
    same everywhere.
    """

    schema = parsing.ACTIVATIONS_SCHEMA

    def draw(
        self, sampler: ItemSampler, fires: Cells, acts: Acts, count: int, rng: np.random.Generator
    ) -> list[Window]:
        """See `LabelTask`: `count` active windows and as many silent ones, a question each."""
        windows = []
        for number, _ in sampler.both_kinds(fires, acts, count, rng) if count else ():
            cells = sampler.cells(number)
            real = np.zeros(cells.size)
            inside = np.isin(fires, cells)
            real[np.searchsorted(cells, fires[inside])] = acts[inside]
            windows.append(Window(cells, real))
        return windows

    def show(self, sampler: ItemSampler, question: Window) -> list[str]:
        """See `LabelTask`."""
        return sampler.tokens(question.cells)

    def parse(self, answer: str, count: int) -> list[int]:
        """See `LabelTask`: a guess a token."""
        return parsing.parse_activations(answer, count)

    def expected_tokens(self, count: int) -> int | None:
        """See `LabelTask`."""
        return ACTIVATION_TOKENS * count

    def read(self, question: Window, held: BoolArray) -> list[int]:
        """See `LabelTask`: it cannot know the strengths."""
        return [parsing.MAX_ACTIVATION * int(holds) for holds in held[question.cells]]

    def score(
        self, questions: Sequence[Window], answers: Sequence[list[int] | None]
    ) -> float | None:
        """See `LabelTask`."""
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
    "detection": WindowTask(ItemSampler.detection),
    "fuzzing": WindowTask(ItemSampler.fuzzing),
    "intruder": IntruderTask(),
    "simulation": SimulationTask(),
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
