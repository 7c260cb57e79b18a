"""Confidences after people's verdicts: Platt scaling on a uniform audit, and a new threshold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer

from rldecoder.interp.calibration import (
    AcceptanceRegression,
    Calibration,
    Reliability,
    high_confidence_threshold,
    out_of_fold,
    reliability,
    thresholds,
)
from rldecoder.interp.records import FeatureLabel
from rldecoder.schemas import JsonRecord

FloatArray = NDArray[np.float64]
MIN_AUDIT_VERDICTS = 20
"""Fewer uniformly drawn verdicts do not recalibrate confidences."""
NUM_FOLDS = 5


class Before(JsonRecord):
    """How confidences held before they were refitted; as in `Reliability`."""

    ece: float | None
    brier: float | None


class PeopleReliability(Reliability):
    """How confidences hold against people, out of fold."""

    accepted: int
    """Labels that people accepted."""
    before: Before
    high_confidence_threshold: float | None
    """The new one; None: no threshold is safe enough."""


class Recalibrated(NamedTuple):
    """The features with the confidences that people's verdicts ask for."""

    features: list[FeatureLabel]
    tau: float | None
    """Least confidence of a label of high confidence; None: no threshold is safe enough."""
    people: PeopleReliability | None
    """None with too few verdicts, and nothing changed."""


def recalibrated(
    features: list[FeatureLabel], drafted: list[FeatureLabel], tau: float | None
) -> Recalibrated:
    """Confidences and threshold refitted to people's audit verdicts, if there are enough.

    A logistic regression on logit(p) (Platt scaling). Only verdicts marked `audit` (drawn
    uniformly) count: verdicts taken from the queue are on uncertain labels and would bias it.
    Each latent counts once, by the last such verdict on the labeler's own label; a label that was
    replaced without a verdict was not accepted. The new threshold is the smallest one that the
    audit itself allows, from confidences out of fold. With fewer than MIN_AUDIT_VERDICTS, or
    verdicts of one kind, nothing changes. Labels that nobody judged are of high confidence if
    their new confidence reaches the new threshold.

    Args:
        features: with reviews merged.
        drafted: the same latents before that; their confidences are those of the labeler's labels.
        tau: the threshold from before.
    """
    audit = _audit(features, drafted)
    if audit.accepted.size < MIN_AUDIT_VERDICTS or audit.accepted.all() or not audit.accepted.any():
        return Recalibrated(features, tau, None)
    platt = make_pipeline(FunctionTransformer(_logit), AcceptanceRegression())
    model = platt.fit(audit.features, audit.accepted)
    folds = KFold(NUM_FOLDS, shuffle=True, random_state=0)
    held_out = out_of_fold(platt, audit.features, audit.accepted, folds)
    tau = high_confidence_threshold(thresholds(held_out, audit.accepted, audit.latents))
    now, before = (reliability(p, audit.accepted) for p in (held_out, audit.features[:, 0]))
    people = PeopleReliability(
        **dict(now),
        accepted=int(audit.accepted.sum()),
        before=Before(ece=before.ece, brier=before.brier),
        high_confidence_threshold=tau,
    )
    moved = [f if f.by_person or f.label is None else _moved(f, model, tau) for f in features]
    return Recalibrated(moved, tau, people)


def _moved(feature: FeatureLabel, model: Pipeline, tau: float | None) -> FeatureLabel:
    ends = (feature.confidence_low, feature.confidence, feature.confidence_high)
    # Sorted: people may find the labels worse the surer the labeler is.
    low, p, high = sorted(map(float, model.predict_proba(np.array(ends)[:, None])[:, 1]))
    changes = {"confidence": p, "confidence_low": low, "confidence_high": high}
    if not any(review.judges(feature.label) for review in feature.reviews):
        changes["high_confidence"] = tau is not None and p >= tau
    return feature.model_copy(update=changes)


def _audit(features: list[FeatureLabel], drafted: list[FeatureLabel]) -> Calibration:
    """Verdicts of the audit, one a latent; the feature is the labeler's confidence."""
    own = {feature.latent: feature for feature in drafted}
    rows = [
        (own[f.latent].confidence, verdict, f.latent)
        for f in features
        if (verdict := _audit_verdict(f, own[f.latent].label)) is not None
    ]
    return Calibration(
        np.array([p for p, _, _ in rows], np.float64)[:, None],
        np.array([verdict for _, verdict, _ in rows], bool),
        np.array([latent for _, _, latent in rows], np.int64),
    )


def _audit_verdict(feature: FeatureLabel, own: str | None) -> bool | None:
    """What people said of the labeler's own label in the audit; None if nothing.

    Rejections mostly come with a better label, so those must count although the label is gone. A
    verdict that says which label it judged counts if it was this one; of one that does not say,
    the order tells: what comes after a better label is about that.
    """
    if own is None:  # it had failed: there was no label to judge
        return None
    verdict, replaced = None, False
    for review in feature.reviews:
        about_own = review.shown == own if review.shown is not None else not replaced
        better = review.label is not None and review.label != own
        said = False if review.accept is None and better else review.accept
        if review.audit and about_own and said is not None:
            verdict = said
        replaced = replaced or better
    return verdict


def _logit(p: FloatArray) -> FloatArray:
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))
