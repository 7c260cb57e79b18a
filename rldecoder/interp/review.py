"""People's verdicts: how they are kept, and what becomes of the labels."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from rldecoder.errors import BadInputError
from rldecoder.evals.statistics import wilson_interval
from rldecoder.files import explained
from rldecoder.interp.records import FeatureLabel, Review, Scores

_log = logging.getLogger(__name__)
REVIEWS_FILE = "reviews.jsonl"
"""In the store, where no other file is named."""


class ReviewLine(Review):
    """One line of a review file (JSONL)."""

    sae_digest: str
    """Digest of the SAE the latent belongs to: latent 7 of another SAE is another latent."""
    latent: int

    def bare(self) -> Review:
        """The verdict as a feature's record holds it: without whose feature it is about."""
        return Review(**self.model_dump(exclude={"sae_digest", "latent"}))


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
    # ASCII: Unicode has line ends of its own, and some readers break lines there.
    data = json.dumps(line.model_dump(), ensure_ascii=True).encode() + b"\n"
    with explained(path.parent, f"adding a verdict to {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            _append(path, data)
    return line


def _append(path: Path, data: bytes) -> None:
    """Add bytes on a line of their own: all of them, or, when that fails, none."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags, 0o666)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise BadInputError(f"{path} is no plain file.", "", "Name another file for verdicts.")
        before = found.st_size
        if before and os.pread(file, 1, before - 1) != b"\n":
            data = b"\n" + data
        try:
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except BaseException:
            os.ftruncate(file, before)  # the lock is held: nobody else has written since
            raise
    finally:
        os.close(file)


def read_reviews(
    path: Path, sae_digest: str, note: Callable[[str], None] = _log.warning, *, strict: bool = True
) -> list[ReviewLine]:
    """The lines of a review file that belong to this SAE, in file order.

    A line that a killed writer or a disk has spoilt is left out: it must not lock out all other
    verdicts. It stays in the file.

    Args:
        note: told of each line that is left out.
        strict: refuse lines that somebody wrote wrongly; else they are left out as well.

    Raises:
        BadInputError: the file is missing, or (if strict) a line is whole but no review.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BadInputError(
            f"The review file {path} cannot be read.",
            str(error),
            "Correct `label_features.reviews`, or leave it empty.",
        ) from error

    out = []
    for number, data in enumerate(lines, start=1):
        if not data.strip():
            continue
        try:
            line = ReviewLine.model_validate(json.loads(data.decode()))
        except (ValueError, RecursionError) as error:
            if _spoilt(data, error):
                note(f"Line {number} of {path} is torn or damaged and is left out.")
                continue
            why = str(error).splitlines()[0]
            if not strict:
                note(f"Line {number} of {path} is not a review and is left out: {why}.")
                continue
            raise BadInputError(
                f"Line {number} of {path} is not a review.",
                why,
                "A line is a JSON object with sae_digest, latent, reviewer, and accept or label.",
            ) from error
        if line.sae_digest == sae_digest:
            out.append(line)
    return out


def settled(lines: Iterable[ReviewLine], features: Iterable[FeatureLabel]) -> set[int]:
    """Latents whose label, as it stands in `features`, has a verdict or a better one."""
    label_of = {feature.latent: feature.label for feature in features}
    return {line.latent for line in lines if line.settles(label_of.get(line.latent))}


def _spoilt(data: bytes, error: Exception) -> bool:
    """Whether a line that is no review looks like one of ours that broke, and no typing error."""
    if isinstance(error, UnicodeDecodeError) or b"\0" in data:
        return True
    broken = isinstance(error, json.JSONDecodeError | RecursionError)
    return broken and data.lstrip().startswith(b'{"')


def merge_reviews(
    features: list[FeatureLabel], reviews: Iterable[ReviewLine]
) -> list[FeatureLabel]:
    """The features after people's verdicts.

    A verdict on the present label decides `high_confidence`; a new label replaces the old one,
    which is kept in `previous_labels`, and takes away predicate, scores and confidence, which
    belonged to the old label. Of several verdicts the last counts; all are kept. Reviews of
    latents that are not among the features change nothing.
    """
    by_latent: dict[int, list[Review]] = {}
    for line in reviews:
        by_latent.setdefault(line.latent, []).append(line.bare())
    out = []
    for feature in features:
        for review in by_latent.get(feature.latent, []):
            feature = _merge(feature, review)
        if feature.by_person:
            feature = feature.model_copy(update=_confidence_in_words(feature))
        out.append(feature)
    return out


def _merge(feature: FeatureLabel, review: Review) -> FeatureLabel:
    changes: dict[str, object] = {"reviews": [*feature.reviews, review]}
    if review.judges(feature.label):
        changes["high_confidence"] = review.accept is True and feature.status == "labelled"
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


def _confidence_in_words(feature: FeatureLabel) -> dict[str, float]:
    """What is known of a person's label: who gave it is for it, and what others said of it.

    The smoothed share of those for it, with its Wilson interval: what labels get where no
    regression can be fitted. The old label's p says nothing of this one.
    """
    authors = {r.reviewer for r in feature.reviews if r.label == feature.label}
    said = dict.fromkeys(authors, True)
    for review in feature.reviews:
        if review.shown == feature.label and review.accept is not None:
            said[review.reviewer] = review.accept
    votes, good = len(said), sum(said.values())
    low, high = wilson_interval(good, votes)
    p = (good + 1) / (votes + 2)
    return {"confidence": p, "confidence_low": min(low, p), "confidence_high": max(high, p)}
