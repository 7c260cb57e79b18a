"""From evidence to records, with a model that labels and reads without error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse

from rldecoder.config.llm import Budget, LlmConfig
from rldecoder.errors import BudgetExceededError
from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.control_latents import ControlLatents
from rldecoder.interp.corpus import Firings, SplitFirings
from rldecoder.interp.llm.backends import Attempts, ChatRequest, Prices, Reply, TokenCount
from rldecoder.interp.llm.labeler import LlmLabeler
from rldecoder.interp.llm.others import InWords
from rldecoder.interp.llm.procedure import LlmRun
from rldecoder.interp.llm.prompts import Message
from rldecoder.interp.llm.results import as_records, llm_summary
from rldecoder.interp.llm.storage import LEDGER
from rldecoder.interp.predicate import describe
from rldecoder.schemas import write_parquet
from tests.interp.llm.fake_server import data_of
from tests.interp.llm.test_judge import asked, meanings, perfect

if TYPE_CHECKING:
    from tests.interp.conftest import Planted

CONFIG = LlmConfig(judge_windows=3, planted_features=5, min_planted=4, control_features=3)


class Clever:
    """A model made of two functions."""

    name = "clever"
    prices = Prices(1.0, 1.0)
    concurrency = 2
    max_failed_in_a_row = 1

    def __init__(self) -> None:
        self.asked: list[ChatRequest] = []
        self.answer: Callable[[ChatRequest], str | None] = lambda request: ""

    def identity(self) -> dict[str, Any]:
        return {"kind": "clever"}

    def ready(self) -> None:
        """Always."""

    def count_tokens(self, messages: Sequence[Message]) -> TokenCount:
        return TokenCount(100, 200)

    def send(self, request: ChatRequest, attempts: Attempts) -> Reply:
        attempts.begin()
        self.asked.append(request)
        text = self.answer(request)
        return Reply(text, "stop" if text is not None else "refused", 100, 10)


Open = Callable[..., LlmRun]


@pytest.fixture
def model() -> Clever:
    return Clever()


@pytest.fixture
def open_run(planted: Planted, tmp_path: Path, model: Clever) -> Open:
    def open_(
        controls: dict[str, ControlLatents] | None = None,
        others: InWords | None = None,
        **changes: Any,
    ) -> LlmRun:
        values = {"cache": tmp_path / "answers.sqlite", **changes}
        run = LlmRun(
            CONFIG.model_copy(update=values), (model, model), planted.fit, planted.scored,
            planted.vocabulary, window_tokens=16, min_firings=10,
            acceptance=Acceptance(detection=0.8, precision=0.5), seed=0,
            progress=tmp_path / "progress", controls=controls or {}, others=others,
        )  # fmt: skip
        labels = [describe(p, planted.vocabulary) for p in planted.predicates]
        held = meanings(run._own.sampler.text, planted.predicates)
        named = labels[: changes.get("max_features", 24)]
        cases = [*run._planted.cases, *run._cases(run._own.sampler, run._own.firings, named)]
        for condition in run._controls:
            labelled = ["x"] * len(condition.firings.latents)
            cases += run._cases(condition.sampler, condition.firings, labelled)
        if (theirs := run._cases_of_others()) is not None:
            cases += [case for _, found in theirs for case in found]
        reads = perfect(run._own.sampler, held, cases)
        seen = meanings(run._seen.text, planted.predicates)
        reads_seen = perfect(run._seen, seen, run._seen_cases(named))

        def answer(request: ChatRequest) -> str | None:
            if request.purpose.endswith("label"):
                return json.dumps({"label": labels[request.latent % len(labels)]})
            return (reads_seen if request.purpose == "seen_detection" else reads)(*asked(request))

        model.answer = answer
        return run

    return open_


@contextmanager
def track(description: str, total: float, unit: str) -> Iterator[Any]:
    """Counts, and demands that each bar gets where it said."""

    class Counter:
        done = 0.0

        def advance(self, amount: float = 1, note: str = "") -> None:
            self.done += amount

    counter = Counter()
    yield counter
    assert counter.done == total, description


def test_right_labels_of_others_lie_above_their_controls(planted: Planted, open_run: Open) -> None:
    labels = [describe(predicate, planted.vocabulary) for predicate in planted.predicates]
    noise = planted.scored.firings.select(np.arange(5))
    rng = np.random.default_rng(0)
    noise.matrix.indices[:] = np.concatenate(
        [np.sort(rng.choice(planted.scored.grid.cells, n, replace=False)) for n in noise.counts]
    )
    # The first latent has two labels, and the second one's is another's.
    rows = (0, *range(24))
    texts = (labels[0], labels[0], labels[5], *labels[2:])
    others = InWords(rows, texts, SplitFirings(planted.scored.grid, noise))
    with open_run(others=others, control_features=12, confidence=False, max_features=20) as run:
        still = run.estimate()
        found = run.label(track)
        assert run.estimate().requests == 0
    assert still.requests + still.cached == len(found.ledger["purpose"])
    judged = found.others
    assert judged is not None
    assert judged.trust.trusted
    detection = [scores.detection for scores in judged.imported]
    assert len(detection) == 21
    assert detection[0] == detection[1] > 0.95
    assert detection[2] < 0.7
    assert np.mean(detection[3:]) > 0.9
    for name, count in (("shuffled", 12), ("random_sae", 12)):
        scores = [scores.detection for scores in judged.controls[name]]
        assert 10 <= len(scores) <= count
        assert abs(np.mean(scores) - 0.5) < 0.2
    assert judged.ours.keys() == {draft.latent for draft in found.own.drafts}


def test_good_models_make_good_labels(
    planted: Planted, open_run: Open, model: Clever, tmp_path: Path
) -> None:
    with open_run(planted_features=10, control_features=6) as run:
        still = run.estimate()
        assert not model.asked
        found = run.label(track)
        done = run.estimate()
        spent = run.spent()
    assert len(model.asked) == still.requests == spent.requests
    assert (done.requests, done.cached) == (0, still.requests)
    assert found.trust.trusted, found.trust.reason
    records = as_records(found)
    assert [records[i].label for i in range(24)] == [d.text for d in found.own.drafts]
    assert all(d.predicate is None and d.failure is None for d in found.own.drafts)
    assert all(r.judge_trusted and r.labeler == LlmLabeler.name for r in records.values())
    summary = llm_summary(found)
    # The text that labels come from was judged as well, but 24 labels are too few for a fit.
    assert summary.confidence.scored == 24
    assert all(r.confidence is None for r in records.values())
    assert all("only 24 labels were scored" in str(r.no_confidence) for r in records.values())
    # Labels that speak of earlier tokens are read without the text before the window.
    assert summary.means["detection"] > 0.95
    assert summary.means["fuzzing"] > 0.95
    assert abs(summary.means_shuffled["detection"] - 0.5) < 0.2
    assert summary.shuffled_latents == 6
    assert summary.cost == pytest.approx(spent.cost)
    assert summary.attempts == len(model.asked)
    write_parquet(tmp_path / "ledger.parquet", found.ledger, LEDGER)
    purposes = set(found.ledger["purpose"])
    assert purposes == {
        "label", "detection", "fuzzing", "planted_detection", "planted_fuzzing",
        "planted_wrong_detection", "planted_wrong_fuzzing", "shuffled_detection",
        "shuffled_fuzzing", "seen_detection",
    }  # fmt: skip


def test_a_second_run_asks_nothing_and_finds_the_same(open_run: Open, model: Clever) -> None:
    with open_run(max_features=4) as run:
        first = run.label(track)
    sent = len(model.asked)
    with open_run(max_features=4) as run:
        second = run.label(track)
    assert len(model.asked) == sent
    assert second._replace(ledger={}) == first._replace(ledger={})


def test_refusals_and_abstentions_are_failures_that_score_0(open_run: Open, model: Clever) -> None:
    with open_run(max_features=8, judge_windows=2) as run:
        good = model.answer

        def answer(request: ChatRequest) -> str | None:
            if request.purpose == "label" and request.latent < 3:
                return [None, '{"label": null}', '{"label": ""}'][request.latent]
            return "eh" if request.purpose == "label_repair" else good(request)

        model.answer = answer
        found = run.label(track)
    assert [d.failure for d in found.own.drafts[:4]] == [
        "the model refused",
        "the model found nothing in common",
        "the answer cannot be read: there is no JSON object in it",
        None,
    ]
    records = as_records(found)
    assert len(records) == 8
    assert [records[i].scores.detection for i in range(3)] == [0.0] * 3
    summary = llm_summary(found)
    assert (summary.labelled, summary.failed) == (5, 3)
    assert summary.means["detection"] == pytest.approx(5 / 8 * summary.means_labelled["detection"])


def test_labels_of_an_untrusted_judge_say_so(open_run: Open, model: Clever) -> None:
    with open_run(max_features=4) as run:
        good = model.answer
        model.answer = lambda r: good(r) if r.purpose == "label" else "yes to all"
        found = run.label(track)
    assert not found.trust.trusted
    assert not any(record.judge_trusted for record in as_records(found).values())
    assert found.own.scores[0].failures == 2


def test_too_small_a_budget_is_told_before_anything_is_sent(open_run: Open, model: Clever) -> None:
    with open_run(max_features=4) as run:
        needed = run.estimate().requests
    told = pytest.raises(BudgetExceededError, match="Nothing was sent now")
    with open_run(max_features=4, budget=Budget(max_requests=needed - 1)) as run, told:
        run.label(track)
    assert not model.asked
    with open_run(max_features=4, budget=Budget(max_requests=needed)) as run:
        run.label(track)
    assert len(model.asked) == needed


def test_the_labeler_sees_only_its_evidence(planted: Planted, open_run: Open) -> None:
    """Every shown window is text of the fitting split, and marks are where the latent fires."""
    with open_run() as run:
        questions = run._labeler(run._clients[0], run._own).questions(run._own.evidence)
    grid, texts = planted.fit.grid, planted.vocabulary.texts
    rows = ["".join(texts[t] for t in row) for row in grid.tokens]
    for latent, question in list(questions.items())[:8]:
        messages = [message._asdict() for message in question.request.messages]
        for line in data_of({"messages": messages}):
            [(kind, value)] = line.items()
            plain = value["text"].replace("⟦", "").replace("⟧", "")
            assert any(plain in row for row in rows), latent
            assert (kind == "active") == ("⟦" in value["text"])
            if kind == "active":
                levels = [level for _, level in value["strengths"]]
                assert all(1 <= level <= 10 for level in levels)
    first = list(data_of({"messages": [m._asdict() for m in questions[0].request.messages]}))
    assert max(level for _, level in first[0]["active"]["strengths"]) == 10


def anywhere(split: SplitFirings, count: int, seed: int) -> SplitFirings:
    """Latents from 24 on that fire on cells drawn at random: no label can be right."""
    rng = np.random.default_rng(seed)
    cells = np.flatnonzero(split.grid.valid)
    rows = np.repeat(np.arange(count), 300)
    columns = np.concatenate([np.sort(rng.choice(cells, 300, False)) for _ in range(count)])
    acts = rng.uniform(0.5, 2.0, rows.size).astype(np.float32)
    matrix = sparse.csr_array((acts, (rows, columns)), shape=(count, split.grid.num_cells))
    return split._replace(firings=Firings(np.arange(24, 24 + count), matrix))


def test_intruder_simulation_and_a_random_sae(
    planted: Planted, open_run: Open, model: Clever
) -> None:
    controls = {
        "random_sae": ControlLatents(anywhere(planted.fit, 30, 0), anywhere(planted.scored, 30, 1)),
        "drawn": ControlLatents(planted.fit, planted.scored).sample(20, 0),
    }
    asks = {"intruder_questions": 3, "simulation_windows": 2, "planted_features": 10}
    with open_run(controls, **asks, control_features=12) as run:
        still = run.estimate()
        assert not model.asked
        found = run.label(track)
        # Latents drawn from the run's own, on the same text: their questions have been asked.
        assert len(model.asked) == still.requests
        assert found.ledger["cached"].count(1) == still.cached > 0
        done = run.estimate()
        assert (done.requests, done.cached) == (0, still.requests + still.cached)
    kinds = {"detection", "fuzzing", "intruder", "simulation"}
    for prefix in ("", "shuffled_", "random_sae_", "drawn_"):
        assert {f"{prefix}{kind}" for kind in kinds} <= set(found.ledger["purpose"])
    assert found.ledger["purpose"].count("random_sae_label") == 30
    assert found.ledger["purpose"].count("drawn_label") == 20
    assert "planted_intruder" not in found.ledger["purpose"]
    record = as_records(found)[0].scores
    assert (record.intruder, record.questions) == (1.0, 2 + 3 + 2 * 2)
    assert record.simulation is not None
    assert record.simulation > 0.8
    summary = llm_summary(found)
    assert summary.means["intruder"] > 0.95
    assert summary.means["simulation"] > 0.8
    assert abs(summary.means_shuffled["intruder"]) < 0.3
    assert abs(summary.means_shuffled["simulation"]) < 0.3
    random, drawn = summary.controls["random_sae"], summary.controls["drawn"]
    assert (random.latents, random.labelled, drawn.latents) == (30, 30, 20)
    assert abs(random.means["detection"] - 0.5) < 0.15
    assert drawn.means["detection"] > 0.95
    assert random.intervals["detection"][0] <= random.means["detection"]
    for gaps in (summary.gaps.label_random_sae, summary.gaps.drawn_random_sae):
        for name in ("detection", "fuzzing", "window_f1", "intruder", "simulation"):
            assert gaps[name].low > 0.1, name
            assert gaps[name].control_latents == 30
    paired = summary.gaps.label_shuffled["detection"]
    assert paired.latents == 12
    assert paired.low > 0.2


def test_without_being_asked_nothing_more_is_sent(open_run: Open, model: Clever) -> None:
    with open_run(max_features=4) as run:
        found = run.label(track)
    summary = llm_summary(found)
    assert summary.controls == {}
    assert summary.gaps.label_random_sae is summary.gaps.drawn_random_sae is None
    assert summary.means["intruder"] is summary.gaps.label_shuffled["intruder"] is None
    assert all(s.intruder is s.simulation is None for s in found.own.scores)


def test_failed_labels_of_a_control_count(planted: Planted, open_run: Open, model: Clever) -> None:
    controls = {
        "random_sae": ControlLatents(anywhere(planted.fit, 6, 0), anywhere(planted.scored, 6, 1)),
        "drawn": ControlLatents(planted.fit, planted.scored).sample(6, 0),
    }
    with open_run(controls, max_features=4, intruder_questions=1) as run:
        good = model.answer
        model.answer = lambda r: None if r.purpose == "random_sae_label" else good(r)
        found = run.label(track)
    summary = llm_summary(found)
    random = summary.controls["random_sae"]
    assert (random.labelled, random.failed, random.judge_questions) == (0, 6, 0)
    assert random.means["detection"] == random.means["intruder"] == 0.0
    gaps = summary.gaps.drawn_random_sae
    assert gaps["detection"].difference == summary.controls["drawn"].means["detection"]
    assert gaps["detection_labelled"] is None
