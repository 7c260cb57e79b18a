"""People's verdicts: how they are kept, and what becomes of the labels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression

from rldecoder.errors import BadInputError
from rldecoder.interp.records import FeatureLabel, Review, Scores

FloatArray = NDArray[np.float64]
MIN_AUDIT_VERDICTS = 20
"""Fewer uniformly drawn verdicts do not recalibrate confidences."""
REVIEWS_FILE = "reviews.jsonl"
"""In the store, where no other file is named."""


class ReviewLine(Review):
    """One line of a review file (JSONL)."""

    sae_digest: str
    """Digest of the SAE the latent belongs to: latent 7 of another SAE is another latent."""
    latent: int
    at: str | None = None
    """When it was given: ISO 8601, UTC, whole seconds."""


def append_review(path: Path, line: ReviewLine) -> ReviewLine:
    """Add one verdict to the file and force it to disk; returns it with its time.

    Several processes may write at once: each line is written whole, under a lock, and after a
    newline, so that what another writer left half-written when it was killed spoils one line and
    not two.

    Args:
        path: made if need be, with its folder.
        line: `at` is filled in where it is None.
    """
    if line.at is None:
        line = line.model_copy(update={"at": datetime.now(UTC).isoformat(timespec="seconds")})
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")), path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        # ASCII: Unicode has line ends of its own, and some readers break lines there.
        file.write(json.dumps(line.model_dump(), ensure_ascii=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return line


def read_reviews(path: Path, sae_digest: str) -> list[ReviewLine]:
    """The lines of a review file that belong to this SAE, in file order.

    Raises:
        BadInputError: the file is missing, or a line is not a review.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise BadInputError(
            f"The review file {path} cannot be read.",
            str(error),
            "Correct `label_features.reviews`, or leave it empty.",
        ) from error
    out = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = ReviewLine.model_validate(json.loads(text))
        except (ValueError, ValidationError) as error:
            raise BadInputError(
                f"Line {number} of {path} is not a review.",
                str(error).splitlines()[0],
                "A line is a JSON object with sae_digest, latent, reviewer, and accept or label.",
            ) from error
        if line.sae_digest == sae_digest:
            out.append(line)
    return out


def merge_reviews(
    features: list[FeatureLabel], reviews: Iterable[ReviewLine]
) -> list[FeatureLabel]:
    """The features after people's verdicts.

    A verdict decides `high_confidence`; a new label replaces the old one, which is kept in
    `previous_labels`, and takes away predicate and scores, which belonged to the old label. Of
    several verdicts the last counts; all are kept. Reviews of latents that are not among the
    features change nothing.
    """
    by_latent: dict[int, list[Review]] = {}
    for line in reviews:
        review = Review(**line.model_dump(exclude={"sae_digest", "latent", "at"}))
        by_latent.setdefault(line.latent, []).append(review)
    out = []
    for feature in features:
        for review in by_latent.get(feature.latent, []):
            feature = _merge(feature, review)
        out.append(feature)
    return out


def recalibrated(features: list[FeatureLabel], tau: float | None) -> list[FeatureLabel]:
    """Confidences refitted to people's audit verdicts, if there are enough.

    A logistic regression on logit(p) (Platt scaling). Only verdicts marked `audit` (drawn
    uniformly) count: verdicts taken from the queue are on uncertain labels and would bias it.
    Each latent counts once, by the last such verdict on the label that its confidence is about;
    a label that was replaced without a verdict was not accepted. With fewer than
    MIN_AUDIT_VERDICTS, or verdicts of one kind, nothing changes. Labels without a verdict are of
    high confidence if their new confidence is at least `tau`.
    """
    verdicts = [(feature.confidence, _audit_verdict(feature)) for feature in features]
    pairs = [(p, verdict) for p, verdict in verdicts if verdict is not None]
    accepted = np.array([verdict for _, verdict in pairs], bool)
    if accepted.size < MIN_AUDIT_VERDICTS or accepted.all() or not accepted.any():
        return features
    model = LogisticRegression().fit(_logit(np.array([p for p, _ in pairs])), accepted)

    def moved(p: float) -> float:
        return float(model.predict_proba(_logit(np.array([p])))[0, 1])

    out = []
    for feature in features:
        if feature.predicate is not None:
            low, p, high = sorted(
                moved(value)
                for value in (
                    feature.confidence_low,
                    feature.confidence,
                    feature.confidence_high,
                )
            )
            changes = {"confidence": p, "confidence_low": low, "confidence_high": high}
            if all(review.accept is None for review in feature.reviews):
                changes["high_confidence"] = tau is not None and p >= tau
            feature = feature.model_copy(update=changes)
        out.append(feature)
    return out


def _audit_verdict(feature: FeatureLabel) -> bool | None:
    """What people said of the labeler's own label in the audit; None if nothing.

    Rejections mostly come with a better label, so those must count although the label is gone.
    """
    if feature.confidence == 0:  # it had failed: there was no label to judge
        return None
    own = feature.previous_labels[0] if feature.previous_labels else feature.label
    verdict = None
    for review in feature.reviews:
        replaced = review.label is not None and review.label != own
        said = False if review.accept is None and replaced else review.accept
        if review.audit and said is not None:
            verdict = said
        if replaced:
            break  # what comes later is about a person's label
    return verdict


def _logit(p: FloatArray) -> FloatArray:
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))[:, None]


def _merge(feature: FeatureLabel, review: Review) -> FeatureLabel:
    changes: dict[str, object] = {"reviews": [*feature.reviews, review]}
    if review.accept is not None:
        changes["high_confidence"] = review.accept and feature.status == "labelled"
    if review.label is not None and review.label != feature.label:
        old = feature.label if feature.label is not None else f"(failed: {feature.failure})"
        changes |= {
            "label": review.label,
            "status": "labelled",
            "failure": None,
            "predicate": None,
            "labeler": f"person:{review.reviewer}",
            "high_confidence": True,
            "previous_labels": [*feature.previous_labels, old],
            "scores": Scores(
                detection=None,
                fuzzing=None,
                precision=None,
                recall=None,
                f1=None,
                auprc=None,
                firings=feature.scores.firings,
            ),
        }
    return feature.model_copy(update=changes)
