"""How sure a label in words is: p(accept), or why nothing can be said.

A label in words is *accepted* on a text if its judged detection and window precision reach the bars
that predicates have to reach. The judge is asked once more about each label, on windows of the
text that labels come from: these answers, the support and the label's length are the features, and
acceptance on the `test` split is the outcome. Each label gets its p from a logistic regression on
the *other* labels' outcomes (five folds over latents), so no label's own test score decides its p,
and ECE and Brier over all labels are out of fold. With too few scored labels, outcomes of one kind,
or a judge that is not trusted there is no p: a number without evidence would be invented.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from rldecoder.interp.calibration import (
    Acceptance,
    Calibration,
    ConfidenceModel,
    ReliabilityBin,
    reliability,
)
from rldecoder.interp.labelers import LabelDraft
from rldecoder.interp.records import JudgedScores, JudgeTrust, LabelConfidence
from rldecoder.schemas import JsonRecord, optional

FloatArray = NDArray[np.float64]
MIN_SCORED = 30
"""Fewer labels with features and outcome are not enough to fit p(accept)."""
MIN_EACH = 5
"""Of both outcomes so many are needed: one for each fold."""
NUM_FOLDS = 5


class WordCalibration(JsonRecord):
    """How confidences of labels in words hold, or why there are none."""

    reason: str | None
    """Why there are none."""
    ece: float | None
    """As in `Reliability`, like `brier`, `n` and `bins`; the last two are absent without
    confidences."""
    brier: float | None
    n: int | None = optional()
    bins: tuple[ReliabilityBin, ...] | None = optional()
    scored: int | None = optional()
    """Labels with features and outcome; absent, as the next two, where it was not asked for."""
    accepted: int | None = optional()
    """Of these, those that passed."""
    min_scored: int | None = optional()
    """With fewer there are no confidences."""


class WordConfidences(NamedTuple):
    """What is known of labels in words, one entry a label."""

    found: list[LabelConfidence | None]
    reasons: list[str | None]
    """Why there is no confidence; None where there is one."""
    report: WordCalibration


def accepted(acceptance: Acceptance, scores: JudgedScores) -> bool | None:
    """Whether a label passes; None if it was not scored."""
    if scores.detection is None or scores.window_precision is None:
        return None
    return (
        scores.detection >= acceptance.detection and scores.window_precision >= acceptance.precision
    )


def word_confidences(
    drafts: Sequence[LabelDraft],
    seen: Sequence[JudgedScores],
    scores: Sequence[JudgedScores],
    trust: JudgeTrust,
    acceptance: Acceptance,
    seed: int,
) -> WordConfidences:
    """p(accept) of each label, from the outcomes of the others.

    Args:
        seen: judged on the text that the labels come from.
    """
    outcome = [accepted(acceptance, score) for score in scores]
    reasons = [_unfit(*row) for row in zip(drafts, seen, strict=True)]
    fit = np.array(
        [i for i, reason in enumerate(reasons) if reason is None and outcome[i] is not None], int
    )
    y = np.array([bool(outcome[i]) for i in fit], bool)
    refusal = _refusal(y, trust)
    report = WordCalibration(
        reason=refusal,
        ece=None,
        brier=None,
        scored=y.size,
        accepted=int(y.sum()),
        min_scored=MIN_SCORED,
    )
    if refusal is not None:
        every: list[str | None] = [reason or refusal for reason in reasons]
        return WordConfidences([None] * len(drafts), every, report)

    rows = [
        None if reason else _features(draft, judged)
        for reason, draft, judged in zip(reasons, drafts, seen, strict=True)
    ]
    x = np.array([rows[i] for i in fit])
    latents = np.array([drafts[i].latent for i in fit])
    found: list[LabelConfidence | None] = [None] * len(drafts)
    p = np.zeros(y.size)
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed % 2**32)
    for train, test in folds.split(x, y):
        model = ConfidenceModel(Calibration(x[train], y[train], latents[train]), seed=seed)
        mean, low, high = model.predict(x[test])
        p[test] = mean
        for place, values in zip(test, zip(mean, low, high, strict=True), strict=True):
            found[int(fit[place])] = _confidence(*values)
    # Labels that `test` has too few windows for take no part in the fit: all others may.
    rest = [i for i, row in enumerate(rows) if row is not None and found[i] is None]
    if rest:
        model = ConfidenceModel(Calibration(x, y, latents), seed=seed)
        predicted = model.predict(np.array([rows[i] for i in rest]))
        for i, values in zip(rest, zip(*predicted, strict=True), strict=True):
            found[i] = _confidence(*values)
    measured = reliability(p, y)
    report = report.model_copy(update=dict(measured))
    return WordConfidences(found, reasons, report)


def _refusal(y: NDArray[np.bool_], trust: JudgeTrust) -> str | None:
    """Why nothing is fitted; None if it can be."""
    if not trust.trusted:
        return "the judge is not trusted, so its verdicts say nothing"
    if y.size < MIN_SCORED:
        return f"only {y.size} labels were scored; {MIN_SCORED} are needed to fit p(accept)"
    rare = int(min(y.sum(), (~y).sum()))
    if rare < MIN_EACH:
        kind = "accepted" if y.sum() <= (~y).sum() else "not accepted"
        return f"only {rare} of {y.size} scored labels were {kind}; {MIN_EACH} are needed"
    return None


def _unfit(draft: LabelDraft, seen: JudgedScores) -> str | None:
    """Why a label can have no confidence of its own."""
    if draft.text is None:
        return "there is no label"
    if seen.detection is None or seen.window_precision is None:
        return "too few windows of either kind in the text that it comes from"
    return None


def _features(draft: LabelDraft, seen: JudgedScores) -> list[float]:
    assert draft.text is not None
    assert seen.detection is not None
    assert seen.window_precision is not None
    words = len(draft.text.split())
    support, length = float(np.log1p(draft.firings)), float(np.log1p(words))
    return [seen.detection, seen.window_precision, support, length]


def _confidence(p: float, low: float, high: float) -> LabelConfidence:
    return LabelConfidence(p=float(p), low=float(low), high=float(high))
