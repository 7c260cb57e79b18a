"""The intruder task, on hand cases and with readers whose quality is known."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rldecoder.interp.llm.items import ItemSampler
from rldecoder.interp.llm.judge import Case, Judge, make_cases
from rldecoder.interp.llm.tasks import TASKS, Group
from rldecoder.interp.predicate import describe
from rldecoder.interp.scores import INTRUDER_WINDOWS
from tests.interp.llm.conftest import CONFIG
from tests.interp.llm.test_judge import Reader, ReaderClient, meanings, perfect

if TYPE_CHECKING:
    from tests.interp.conftest import Planted

TASK = TASKS["intruder"]
QUESTIONS = 4
ASKS = CONFIG.model_copy(update={"intruder_questions": QUESTIONS})


@pytest.fixture(scope="module")
def cases(planted: Planted, sampler: ItemSampler) -> list[Case]:
    labels = [describe(p, planted.vocabulary) for p in planted.predicates]
    return make_cases(sampler, planted.scored.firings, labels, 7, {"intruder": QUESTIONS})


def test_accuracy_is_corrected_for_chance() -> None:
    groups = [Group([], odd) for odd in range(INTRUDER_WINDOWS)]
    right: list[int | None] = [0, 1, 2, 3, 4]
    assert TASK.score(groups, right) == 1.0
    assert TASK.score(groups, [2] * 5) == pytest.approx(0)  # the same piece always
    assert TASK.score(groups, [1, 2, 3, 4, 0]) == pytest.approx(-0.25)
    assert TASK.score(groups, [0, 1, 2, 3, None]) == pytest.approx((0.8 - 0.2) / 0.8)
    assert TASK.score(groups, [None] * 5) == pytest.approx(-0.25)
    assert TASK.score([], []) is None


def test_one_window_is_silent_and_the_others_are_strong(
    planted: Planted, sampler: ItemSampler, cases: list[Case]
) -> None:
    dense = planted.scored.firings.matrix.toarray() * planted.scored.grid.valid.reshape(-1)
    asked, places = 0, set()
    for row, case in enumerate(cases):
        assert len(case.questions["intruder"]) in (0, QUESTIONS)
        for group in case.questions["intruder"]:
            asked += 1
            places.add(group.odd)
            assert len(group.windows) == INTRUDER_WINDOWS
            assert len({item.cells[0] for item in group.windows}) == INTRUDER_WINDOWS
            strongest = [dense[row, item.cells].max() for item in group.windows]
            assert strongest.pop(group.odd) == 0
            assert min(strongest) >= 0.3 * dense[row].max()
    assert asked > 80
    assert places == set(range(INTRUDER_WINDOWS))
    again = make_cases(
        sampler, planted.scored.firings.select(np.array([5])), ["x"], 7,
        {"intruder": QUESTIONS},
    )  # fmt: skip
    assert [g.odd for g in again[0].questions["intruder"]] == [
        g.odd for g in cases[5].questions["intruder"]
    ]


def test_too_few_windows_give_no_question(sampler: ItemSampler) -> None:
    rng = np.random.default_rng(0)
    fires = np.array([sampler.cells(window)[0] for window in range(INTRUDER_WINDOWS - 2)])
    acts = np.ones(fires.size, np.float32)
    assert TASK.draw(sampler, fires, acts, 3, rng) == []
    assert TASK.draw(sampler, fires[:0], acts[:0], 3, rng) == []
    everywhere = np.flatnonzero(sampler.text.valid)
    acts = np.ones(everywhere.size, np.float32)
    assert TASK.draw(sampler, everywhere, acts, 3, rng) == []


def mean_score(reader: Reader, sampler: ItemSampler, cases: list[Case]) -> float:
    scores = Judge(ReaderClient(reader), ASKS).score(sampler, cases)
    for case, found in zip(cases, scores, strict=True):
        assert (found.intruder is None) == (not case.questions["intruder"])
        assert found.questions == len(case.questions["intruder"]) == case.num_questions
        assert found.detection is found.fuzzing is found.simulation is None
    return float(np.mean([s.intruder for s in scores if s.intruder is not None]))


def test_readers_get_what_they_deserve(
    planted: Planted, sampler: ItemSampler, cases: list[Case]
) -> None:
    reads = perfect(sampler, meanings(sampler.text, planted.predicates), cases)
    coin = random.Random(0)
    readers: dict[str, Reader] = {
        "guess": lambda kind, label, pieces: json.dumps({"answer": coin.randint(1, len(pieces))}),
        "first": lambda kind, label, pieces: '{"answer": 1}',
    }
    assert mean_score(reads, sampler, cases) > 0.99
    for name, reader in readers.items():
        assert abs(mean_score(reader, sampler, cases)) < 0.2, name
    # Labels of other latents: as good as guessing, but for what they share.
    wrong = [case._replace(label=cases[n - 1].label) for n, case in enumerate(cases)]
    assert abs(mean_score(reads, sampler, wrong)) < 0.3


@pytest.mark.parametrize("answer", ["no idea", '{"answer": 6}', '{"answers": [1]}'])
def test_a_judge_without_usable_answers_is_wrong(
    sampler: ItemSampler, cases: list[Case], answer: str
) -> None:
    scores = Judge(ReaderClient(lambda *_: answer), ASKS).score(sampler, cases[:3])
    assert [s.intruder for s in scores] == pytest.approx([-0.25] * 3)
    assert [s.failures for s in scores] == [QUESTIONS] * 3


def test_a_failed_label_scores_0_where_the_score_is_asked_for(
    sampler: ItemSampler, cases: list[Case]
) -> None:
    failed = [cases[0]._replace(label=None)]
    client = ReaderClient(lambda *_: "")
    [found] = Judge(client, ASKS).score(sampler, failed)
    assert (found.intruder, found.simulation, found.questions) == (0.0, None, 0)
    assert not client.requests
