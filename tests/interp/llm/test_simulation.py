"""Simulation by a judge, on hand cases, with readers of known quality, and through a server."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

from rldecoder.interp.llm.items import ItemSampler
from rldecoder.interp.llm.judge import Case, Judge, make_cases
from rldecoder.interp.llm.parsing import ACTIVATIONS_SCHEMA
from rldecoder.interp.llm.tasks import TASKS, Window
from rldecoder.interp.predicate import describe
from rldecoder.interp.simulation import UNIT, correlate, simulate
from tests.interp.llm.conftest import CONFIG, OpenClient, outcomes
from tests.interp.llm.fake_server import Answer, data_of, said, serve
from tests.interp.llm.test_judge import Reader, ReaderClient, meanings, perfect

if TYPE_CHECKING:
    from tests.interp.conftest import Planted

TASK = TASKS["simulation"]
COUNT = 3
ASKS = CONFIG.model_copy(update={"simulation_windows": COUNT})


@pytest.fixture(scope="module")
def cases(planted: Planted, sampler: ItemSampler) -> list[Case]:
    labels = [describe(p, planted.vocabulary) for p in planted.predicates]
    return make_cases(sampler, planted.scored.firings, labels, 7, {"simulation": COUNT})


def window(*acts: float) -> Window:
    return Window(np.arange(len(acts)), np.array(acts, np.float64))


def test_hand_cases() -> None:
    windows = [window(0, 2, 0, 0), window(0, 0, 0)]
    assert TASK.score(windows, [[0, 10, 0, 0], [0, 0, 0]]) == pytest.approx(1)
    assert TASK.score(windows, [[0, 3, 0, 0], [0, 0, 0]]) == pytest.approx(1)
    assert TASK.score(windows, [[9, 0, 9, 9], [9, 9, 9]]) == pytest.approx(-1)
    assert TASK.score(windows, [[7] * 4, [7] * 3]) == 0  # the same everywhere
    mixed = [0, 5, 5, 0, 0, 0, 0]
    expected = stats.pearsonr([0, 2, 0, 0, 0, 0, 0], mixed).statistic
    assert TASK.score(windows, [mixed[:4], mixed[4:]]) == pytest.approx(expected)
    assert TASK.score([], []) is None


def test_a_window_without_an_answer_counts_as_0() -> None:
    windows = [window(0, 2, 0, 0), window(0, 0, 0), window(1, 0), window(0, 0)]
    right = [[0, 10, 0, 0], [0, 0, 0], [5, 0], [0, 0]]
    assert TASK.score(windows, right) == pytest.approx(1)
    assert TASK.score(windows, [right[0], None, right[2], None]) == pytest.approx(0.5)
    assert TASK.score(windows, [None] * 4) == 0
    assert TASK.score(windows, [None, [0, 0, 0], None, [0, 0]]) == 0  # silent ones only


def test_guesses_of_0_and_1_are_scored_as_those_of_a_predicate() -> None:
    rng = np.random.default_rng(0)
    acts = np.where(rng.random(200) < 0.3, rng.uniform(0.5, 2, 200), 0).astype(np.float32)
    fires = np.flatnonzero(acts)
    for held in (acts > 0.8, acts == 0, rng.random(200) < 0.5, np.ones(200, bool)):
        exact = simulate(UNIT, held, fires, acts[fires], acts.size).correlation
        assert correlate(held.astype(np.float64), acts.astype(np.float64)) == pytest.approx(exact)
    assert correlate(acts.astype(np.float64), np.full(200, 0.1)) is None
    assert correlate(np.full(200, 0.1), acts.astype(np.float64)) == 0


def test_windows_hold_the_real_activations(planted: Planted, cases: list[Case]) -> None:
    dense = planted.scored.firings.matrix.toarray()
    seen = 0
    for row, case in enumerate(cases):
        assert len(case.questions["simulation"]) in (0, 2 * COUNT)
        for number, found in enumerate(case.questions["simulation"]):
            seen += 1
            np.testing.assert_allclose(found.acts, dense[row, found.cells])
            assert found.acts.any() == (number < COUNT)
    assert seen > 120


def test_too_few_windows_give_no_question(sampler: ItemSampler) -> None:
    fires = sampler.cells(3)[:2]
    acts = np.ones(2, np.float32)
    assert TASK.draw(sampler, fires, acts, 2, np.random.default_rng(0)) == []
    assert len(TASK.draw(sampler, fires, acts, 1, np.random.default_rng(0))) == 2


def all_scores(reader: Reader, sampler: ItemSampler, cases: list[Case]) -> list[float]:
    found = Judge(ReaderClient(reader), ASKS).score(sampler, cases)
    for case, scores in zip(cases, found, strict=True):
        assert (scores.simulation is None) == (not case.questions["simulation"])
        assert scores.questions == len(case.questions["simulation"]) == case.num_questions
        assert scores.detection is scores.intruder is None
    return [s.simulation for s in found if s.simulation is not None]


def test_readers_get_what_they_deserve(
    planted: Planted, sampler: ItemSampler, cases: list[Case]
) -> None:
    real = {
        (case.label, *sampler.tokens(w.cells)): w.acts
        for case in cases
        for w in case.questions["simulation"]
    }
    coin = random.Random(0)

    def knows(kind: str, label: str, tokens: list[str]) -> str:
        # Activations of this world are at most 2.
        return json.dumps({"answers": [round(5 * act) for act in real[label, *tokens]]})

    def guesses(kind: str, label: str, tokens: list[str]) -> str:
        return json.dumps({"answers": [coin.randint(0, 10) for _ in tokens]})

    reads = perfect(sampler, meanings(sampler.text, planted.predicates), cases)
    assert min(all_scores(knows, sampler, cases)) > 0.97
    assert np.mean(all_scores(reads, sampler, cases)) > 0.85  # it cannot know the strengths
    assert abs(np.mean(all_scores(guesses, sampler, cases))) < 0.1
    short = all_scores(lambda *_: '{"answers": [1, 2]}', sampler, cases)
    assert set(short) == {0.0}


def test_the_label_and_each_token_are_shown(sampler: ItemSampler, cases: list[Case]) -> None:
    judge = Judge(ReaderClient(lambda *_: ""), ASKS)
    asked = judge.questions(sampler, cases[0])
    assert set(asked) == {("simulation", n) for n in range(2 * COUNT)}
    request = asked["simulation", 0].request
    assert request.schema is ACTIVATIONS_SCHEMA
    label, *tokens = data_of({"messages": [m._asdict() for m in request.messages]})
    assert label == {"label": cases[0].label}
    shown = sampler.tokens(cases[0].questions["simulation"][0].cells)
    assert tokens == [{"token": n, "text": t} for n, t in enumerate(shown, start=1)]
    assert f"exactly {len(shown)} whole numbers" in request.messages[-1].content


def test_a_list_of_the_wrong_length_is_asked_for_once_more(
    open_client: OpenClient, sampler: ItemSampler, cases: list[Case]
) -> None:
    """Through a real server: the first window is repaired, the second never, one is refused."""
    case = cases[0]
    texts = [tuple(sampler.tokens(w.cells)) for w in case.questions["simulation"]]

    def behave(body: dict[str, Any], number: int) -> Answer:
        tokens = [line["text"] for line in data_of(body)[1:]]
        place = texts.index(tuple(tokens))
        if place == 2:
            return said(None, refusal="no", finish="content_filter")
        repaired = len(body["messages"]) > 2
        if place == 1 or (place == 0 and not repaired):
            return said(json.dumps({"answers": [0] * (len(tokens) - 1)}))
        real = case.questions["simulation"][place].acts
        return said(json.dumps({"answers": [round(5 * act) for act in real]}))

    with serve(behave) as server:
        client = open_client(server)
        [found] = Judge(client, ASKS).score(sampler, [case])
    assert (found.questions, found.failures) == (2 * COUNT, 2)
    known = [n for n in range(2 * COUNT) if n not in (1, 2)]
    real = np.concatenate([case.questions["simulation"][n].acts for n in known])
    expected = correlate(np.round(5 * real), real)
    assert expected is not None
    assert found.simulation == pytest.approx(expected * len(known) / (2 * COUNT))
    assert outcomes(client).count("malformed") == 3
    assert len(server.bodies) == 2 * COUNT + 2
