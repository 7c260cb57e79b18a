"""Confidence of labels in words: calibrated where outcomes allow it, and otherwise not given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.labelers import LabelDraft
from rldecoder.interp.llm.confidence import (
    MIN_EACH,
    MIN_SCORED,
    WordConfidences,
    accepted,
    word_confidences,
)
from rldecoder.interp.llm.judge import JudgeScores
from rldecoder.interp.records import JudgeTrust

BARS = Acceptance(detection=0.8, precision=0.5)


def trust(trusted: bool = True) -> JudgeTrust:
    return JudgeTrust(
        model="m", trusted=trusted, reason=None if trusted else "bad", planted=9, bar=0.8,
        tolerance=0.1, questions=9, failures=0,
    )  # fmt: skip


def judged(detection: float | None, precision: float | None = 0.9) -> JudgeScores:
    return JudgeScores(detection, 0.5, precision, 2, 0)


def draft(latent: int, text: str | None = "token is a number") -> LabelDraft:
    return LabelDraft(latent, text, None, None if text else "refused", 0.0, 50)


Made = tuple[list[LabelDraft], list[JudgeScores], list[JudgeScores], np.ndarray[Any, Any]]


def made(count: int, seed: int = 0) -> Made:
    """Labels whose outcome on `test` is drawn with a known p, of which the other text tells."""
    rng = np.random.default_rng(seed)
    quality = rng.uniform(0.3, 1.0, count)
    p = 1 / (1 + np.exp(-12 * (quality - 0.65)))
    passed = rng.random(count) < p
    seen = [judged(float(q)) for q in quality]
    scores = [judged(0.9 if ok else 0.6) for ok in passed]
    return [draft(n) for n in range(count)], seen, scores, p


def run(*material: Any, trusted: bool = True) -> WordConfidences:
    return word_confidences(*material[:3], trust(trusted), BARS, 0)


def test_confidence_follows_the_true_probability() -> None:
    material = made(240)
    found = run(*material)
    assert found.reasons == [None] * 240
    p = np.array([one.p for one in found.found if one is not None])
    assert np.abs(p - material[3]).mean() < 0.1
    assert found.report.scored == found.report.n == 240
    assert found.report.ece < 0.12
    assert found.report.brier < 0.2
    inside = [one.low <= true <= one.high
              for one, true in zip(found.found, material[3], strict=True) if one]  # fmt: skip
    assert np.mean(inside) > 0.7


def test_a_labels_own_test_score_does_not_decide_its_confidence() -> None:
    # Features that tell nothing: had each label seen its own outcome, p would follow it.
    drafts, _, scores, _ = made(80)
    found = run(drafts, [judged(0.5)] * 80, scores)
    outcome = np.array([accepted(BARS, score) for score in scores], bool)
    p = np.array([one.p for one in found.found if one is not None])
    assert p[outcome].mean() <= p[~outcome].mean() + 1e-9
    assert np.abs(p - outcome.mean()).max() < 0.05


def test_too_little_evidence_gives_no_number() -> None:
    drafts, seen, scores, _ = made(MIN_SCORED - 1)
    found = run(drafts, seen, scores)
    assert found.found == [None] * (MIN_SCORED - 1)
    assert found.report.ece is found.report.brier is None
    assert all(reason and f"only {MIN_SCORED - 1} labels" in reason for reason in found.reasons)
    drafts, seen, scores, _ = made(100)
    rare = [judged(0.9)] * (MIN_EACH - 1) + [judged(0.6)] * (101 - MIN_EACH)
    assert f"only {MIN_EACH - 1} of 100 scored labels were accepted" in str(
        run(drafts, seen, rare).reasons[0]
    )
    common = [judged(0.9)] * 100
    assert "only 0 of 100 scored labels were not accepted" in str(
        run(drafts, seen, common).reasons[0]
    )
    untrusted = run(drafts, seen, scores, trusted=False)
    assert untrusted.found == [None] * 100
    assert "not trusted" in untrusted.report.reason


def test_failures_and_labels_without_windows_say_why() -> None:
    drafts, seen, scores, _ = made(50)
    drafts[0], scores[0] = draft(0, None), JudgeScores(0.0, 0.0, 0.0, 0, 0)
    seen[1] = judged(None, None)
    scores[2] = judged(None, None)
    found = run(drafts, seen, scores)
    assert found.found[0] is None
    assert found.reasons[0] == "there is no label"
    assert found.found[1] is None
    assert "too few windows" in str(found.reasons[1])
    assert found.found[2] is not None  # it has no outcome, and takes that of the others
    assert found.report.scored == 47
    assert sum(one is not None for one in found.found) == 48


@pytest.mark.parametrize(
    ("detection", "precision", "outcome"),
    [(0.8, 0.5, True), (0.79, 0.9, False), (0.9, 0.49, False), (None, 0.9, None),
     (0.9, None, None)],
)  # fmt: skip
def test_acceptance_needs_both_bars(
    detection: float | None, precision: float | None, outcome: bool | None
) -> None:
    assert accepted(BARS, judged(detection, precision)) is outcome
