"""Windows, scores and the judge's gate, against readers whose quality is known."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rldecoder.interp.llm.backends import ChatRequest
from rldecoder.interp.llm.client import Parsed
from rldecoder.interp.llm.gate import Planted as PlantedFeatures
from rldecoder.interp.llm.gate import _candidates, num_questions, plant, try_judge
from rldecoder.interp.llm.items import Item, ItemSampler, balanced
from rldecoder.interp.llm.judge import Case, Judge, make_cases
from rldecoder.interp.llm.parsing import MalformedAnswerError
from rldecoder.interp.llm.tasks import KINDS, TASKS, task_counts
from rldecoder.interp.predicate import Predicate, describe, evaluate
from rldecoder.interp.records import JudgedScores
from rldecoder.interp.scores import BoolArray, ScoringText
from tests.interp.llm.conftest import CONFIG
from tests.interp.llm.fake_server import data_of

if TYPE_CHECKING:
    from tests.interp.conftest import Planted

COUNTS = task_counts(CONFIG)
Reader = Callable[[str, str, list[str]], str]
"""From kind, label and pieces to an answer's text."""


class ReaderClient:
    """Stands for a client: a function answers, unreadable answers are failures."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.requests: list[ChatRequest] = []

    def ask_all(self, questions, on_answer=lambda: None):
        found = []
        for question in questions:
            self.requests.append(question.request)
            answer = self.reader(*asked(question.request))
            try:
                found.append(Parsed(question.parse(answer), None))
            except MalformedAnswerError as error:
                found.append(Parsed(None, str(error)))
            on_answer()
        return found


def asked(request: ChatRequest) -> tuple[str, str, list[str]]:
    """What a judge is shown: kind, label, and texts of pieces or tokens."""
    [label, *pieces] = data_of({"messages": [m._asdict() for m in request.messages]})
    return request.purpose.rsplit("_", 1)[-1], label["label"], [piece["text"] for piece in pieces]


def items_of(case: Case, kind: str) -> list[Item]:
    """Windows of detection or fuzzing."""
    return [item for question in case.questions[kind] for item in question]


def answers(values: list[bool]) -> str:
    return json.dumps({"answers": values})


@pytest.fixture(scope="module")
def features(sampler: ItemSampler) -> PlantedFeatures:
    return plant(sampler.text, sampler, CONFIG, 0)


def meanings(text: ScoringText, predicates: Sequence[Predicate] = ()) -> dict[str, BoolArray]:
    """Where each label holds: of all planted features there can be, and of more predicates."""
    every = [*_candidates(text, np.random.default_rng(0)), *predicates]
    return {describe(p, text.vocabulary): text.holds(p) for p in every}


def perfect(sampler: ItemSampler, held: dict[str, BoolArray], cases: Sequence[Case]) -> Reader:
    """Reads labels without error, about the windows of some cases."""
    known = {
        (kind, *TASKS[kind].show(sampler, question)): question
        for case in cases for kind, questions in case.questions.items() for question in questions
    }  # fmt: skip

    def read(kind: str, label: str, pieces: list[str]) -> str:
        answer = TASKS[kind].read(known[kind, *pieces], held[label])
        if kind == "intruder":
            return json.dumps({"answer": 1 + answer})
        return json.dumps({"answers": answer})

    return read


@pytest.fixture(scope="module")
def reads(sampler: ItemSampler, features: PlantedFeatures) -> Reader:
    return perfect(sampler, meanings(sampler.text), features.cases)


def test_windows_are_what_they_are_said_to_be(planted: Planted, sampler: ItemSampler) -> None:
    """The truth of each item, recomputed from tokens and predicates."""
    labels = ["x"] * len(planted.predicates)
    cases = make_cases(sampler, planted.scored.firings, labels, 7, COUNTS)
    usable = 0
    for predicate, case in zip(planted.predicates, cases, strict=True):
        held = evaluate(predicate, planted.scored.grid.tokens, planted.vocabulary)
        fires = (held & planted.scored.grid.valid).reshape(-1)
        for item in items_of(case, "detection"):
            assert 15 <= item.cells.size <= 16  # position 0 is not valid
            assert np.unique(item.cells // 16).size == 1
            assert item.truth == fires[item.cells].any()
        for item in items_of(case, "fuzzing"):
            usable += 1
            assert np.isin(item.marked, item.cells).all()
            marks = fires[item.marked]
            # Weak activations (< 0.3 of the largest) are unmarked too; the planted ones are not.
            assert marks.all() if item.truth else not marks.any()
        for kind in KINDS:
            truths = [item.truth for item in items_of(case, kind)]
            assert sum(truths) in (0, CONFIG.judge_windows)
            assert len(truths) in (0, 2 * CONFIG.judge_windows)
    assert usable > 100
    again = make_cases(sampler, planted.scored.firings.select(np.array([5])), ["x"], 7, COUNTS)
    assert items_of(again[0], "detection")[0].cells.tolist() == (
        items_of(cases[5], "detection")[0].cells.tolist()
    )


def test_missing_answers_are_wrong() -> None:
    nothing = np.zeros(0, np.int64)
    items = [Item(nothing, nothing, truth) for truth in (True, True, False, False)]
    assert balanced(items, [True, True, False, False]) == 1.0
    assert balanced(items, [None, True, None, False]) == 0.5
    assert balanced(items, [None] * 4) == 0.0
    assert balanced(items[:2], [True, True]) is None


def test_a_failed_label_scores_0_and_is_not_asked_about(
    planted: Planted, sampler: ItemSampler
) -> None:
    client = ReaderClient(lambda *_: "no idea")
    labels: list[str | None] = [None] * len(planted.predicates)
    labels[3] = "something"
    judge = Judge(client, CONFIG)
    scores = judge.score(sampler, make_cases(sampler, planted.scored.firings, labels, 0, COUNTS))
    assert len(client.requests) == 2
    nothing = JudgedScores(
        detection=0.0, fuzzing=0.0, window_precision=0.0, window_recall=0.0, window_f1=0.0,
        questions=0, failures=0,
    )  # fmt: skip
    assert scores[0] == nothing
    # A silent judge is wrong about everything.
    assert scores[3] == nothing.model_copy(update={"questions": 2, "failures": 2})


def test_window_precision_is_that_of_the_whole_split(
    planted: Planted, sampler: ItemSampler
) -> None:
    """A judge who always says yes names every window: its precision is the base rate."""
    yes = ReaderClient(lambda kind, label, pieces: answers([True] * len(pieces)))
    labels = ["x"] * len(planted.predicates)
    cases = make_cases(sampler, planted.scored.firings, labels, 0, COUNTS)
    for case, scores in zip(cases, Judge(yes, CONFIG).score(sampler, cases), strict=True):
        if items_of(case, "detection"):
            assert scores.detection == 0.5
            assert scores.window_precision == pytest.approx(case.active_share)
            assert scores.window_recall == 1.0
            share = case.active_share
            assert scores.window_f1 == pytest.approx(2 * share / (1 + share))
        else:
            assert scores.window_recall is scores.window_f1 is None


def test_planted_features_are_many_and_different(
    features: PlantedFeatures, sampler: ItemSampler
) -> None:
    assert len(features.cases) == 16
    assert len({case.label for case in features.cases}) == 16
    assert features.exact_right == {"detection": 1.0, "fuzzing": 1.0}
    for right, wrong in zip(features.cases, features.wrong, strict=True):
        assert right.label != wrong.label
        assert right.questions is wrong.questions
    assert abs(features.exact_wrong["detection"] - 0.5) < 0.1
    assert abs(features.exact_wrong["fuzzing"] - 0.5) < 0.1
    again = plant(sampler.text, sampler, CONFIG, 0)
    assert [case.label for case in again.cases] == [case.label for case in features.cases]


def trial(reader: Reader, sampler: ItemSampler, features: PlantedFeatures):
    client = ReaderClient(reader)
    trust = try_judge(Judge(client, CONFIG), "m", sampler, features, CONFIG)
    assert len(client.requests) == num_questions(features) == trust.questions
    return trust


def test_a_judge_that_reads_is_trusted(
    sampler: ItemSampler, features: PlantedFeatures, reads: Reader
) -> None:
    trust = trial(reads, sampler, features)
    assert trust.trusted
    assert trust.reason is None
    for kind in KINDS:
        found = getattr(trust, kind)
        assert found.right == found.exact_right == 1.0
        assert found.wrong == pytest.approx(found.exact_wrong)
        assert found.wrong_low <= found.wrong <= found.wrong_high


def test_judges_that_do_not_read_are_not_trusted(
    sampler: ItemSampler, features: PlantedFeatures, reads: Reader
) -> None:
    coin = random.Random(0)
    calls = [0]

    def silent_half(kind: str, label: str, pieces: list[str]) -> str:
        calls[0] += 1
        return reads(kind, label, pieces) if calls[0] % 2 else "I would rather not"

    def backwards(kind: str, label: str, pieces: list[str]) -> str:
        return answers([not value for value in json.loads(reads(kind, label, pieces))["answers"]])

    def knows_the_truth(kind: str, label: str, pieces: list[str]) -> str:
        """Ignores the label and answers what is true: wrong labels score high as well."""
        return answers([truth[kind, piece] for piece in pieces])

    truth = {
        (kind, sampler.show(item)): item.truth
        for case in features.cases for kind in KINDS for item in items_of(case, kind)
    }  # fmt: skip
    readers: dict[str, Reader] = {
        "yes": lambda kind, label, pieces: answers([True] * len(pieces)),
        "no": lambda kind, label, pieces: answers([False] * len(pieces)),
        "coin": lambda kind, label, pieces: answers([coin.random() < 0.5 for _ in pieces]),
        "mute": lambda kind, label, pieces: "",
        "silent half": silent_half,
        "backwards": backwards,
        "ignores labels": knows_the_truth,
    }
    for name, reader in readers.items():
        trust = trial(reader, sampler, features)
        assert not trust.trusted, name
        assert trust.reason, name
    assert "wrong labels" in trust.reason  # the last one: right ones are no objection
    assert trial(readers["mute"], sampler, features).failures == num_questions(features)


def test_too_few_planted_features_are_no_proof(sampler: ItemSampler) -> None:
    config = CONFIG.model_copy(update={"planted_features": 5})
    few = plant(sampler.text, sampler, config, 0)
    client = ReaderClient(perfect(sampler, meanings(sampler.text), few.cases))
    trust = try_judge(Judge(client, config), "m", sampler, few, config)
    assert not trust.trusted
    assert "room for 5" in (trust.reason or "")
