from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rldecoder.errors import BadInputError
from rldecoder.interp.predicate import TokenClass
from rldecoder.interp.recalibration import Recalibrated, recalibrated
from rldecoder.interp.records import FeatureLabel, Scores
from rldecoder.interp.review import ReviewLine, merge_reviews, read_reviews, settled


def feature(latent: int, p: float = 0.7, **changes: Any) -> FeatureLabel:
    scores = Scores(
        detection=0.9, fuzzing=0.9, precision=0.5, recall=0.5, f1=0.5, auprc=0.3, firings=9
    )
    values: dict[str, Any] = {
        "latent": latent,
        "status": "labelled",
        "label": "token is a number",
        "failure": None,
        "predicate": TokenClass(name="number"),
        "labeler": "predicate-1",
        "confidence": p,
        "confidence_low": p,
        "confidence_high": p,
        "high_confidence": False,
        "importance": 1.0,
        "importance_rank": latent + 1,
        "density": 0.01,
        "scores": scores,
        "examples": [],
        "promoted": [],
        "suppressed": [],
        "audit": False,
    }
    return FeatureLabel.model_validate(values | changes)


OWN = "token is a number"
DRAFTED = [*(feature(n, 0.2 + 0.006 * n) for n in range(100)), feature(500, 0.8)]


def review_file(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps({"sae_digest": "abc", **line}) for line in lines) + "\n\n")
    return path


def test_reading_keeps_order_and_leaves_out_other_saes(tmp_path: Path) -> None:
    path = review_file(
        tmp_path / "r.jsonl",
        {"latent": 4, "reviewer": "ann", "accept": True},
        {"latent": 4, "reviewer": "bob", "accept": False, "sae_digest": "other"},
        {"latent": 1, "reviewer": "bob", "label": "years", "audit": True},
    )
    found = read_reviews(path, "abc")
    assert [(r.latent, r.reviewer, r.accept) for r in found] == [(4, "ann", True), (1, "bob", None)]


@pytest.mark.parametrize("line", ["{'latent': 1}", '{"latent": 1}', "[]", "latent 4"])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = review_file(tmp_path / "r.jsonl", {"latent": 4, "reviewer": "ann", "accept": True})
    path.write_text(path.read_text().strip() + "\n" + line)
    with pytest.raises(BadInputError, match="Line 2 of"):
        read_reviews(path, "abc")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be read"):
        read_reviews(tmp_path / "none.jsonl", "abc")


def test_verdicts_and_new_labels_keep_history(tmp_path: Path) -> None:
    path = review_file(
        tmp_path / "r.jsonl",
        {"latent": 0, "reviewer": "ann", "accept": True},
        {"latent": 0, "reviewer": "bob", "accept": False},
        {"latent": 1, "reviewer": "ann", "label": "years after 1900"},
        {"latent": 2, "reviewer": "ann", "label": "greetings", "note": "clear"},
        {"latent": 99, "reviewer": "ann", "accept": True},
    )
    failed = feature(2, 0.0, status="failed", label=None, failure="too few", predicate=None)
    found = merge_reviews([feature(0), feature(1), failed, feature(3)], read_reviews(path, "abc"))
    assert not found[0].high_confidence
    assert [r.reviewer for r in found[0].reviews] == ["ann", "bob"]
    assert found[0].predicate is not None
    assert found[1].label == "years after 1900"
    assert found[1].previous_labels == ["token is a number"]
    assert found[1].predicate is None
    assert found[1].labeler == "person:ann"
    assert found[1].scores.detection is None
    assert found[2].status == "labelled"
    assert found[2].previous_labels == ["(failed: too few)"]
    assert found[3] == feature(3)


def test_a_verdict_belongs_to_the_label_that_it_judged() -> None:
    def line(reviewer: str, **said: Any) -> ReviewLine:
        return ReviewLine(sae_digest="abc", latent=0, reviewer=reviewer, **said)

    old, own = "a label of an earlier run", "token is a number"
    for accept in (True, False):
        drafted = feature(0, high_confidence=not accept)
        (found,) = merge_reviews([drafted], [line("ann", accept=accept, shown=old)])
        assert found.high_confidence == drafted.high_confidence
        assert [r.shown for r in found.reviews] == [old]  # kept all the same
        assert not found.reviewed
        assert settled([line("ann", accept=accept, shown=old)], [drafted]) == set()
        for shown in (own, None):
            verdict = line("ann", accept=accept, shown=shown)
            (found,) = merge_reviews([drafted], [verdict])
            assert found.high_confidence == accept
            assert found.reviewed
            assert settled([verdict], [drafted]) == {0}
    # A better label is about the latent, whatever stood there.
    relabel = line("bob", label="years", accept=False, shown=old)
    late = line("cem", accept=False, shown=own)
    (found,) = merge_reviews([feature(0)], [relabel, late])
    assert (found.label, found.high_confidence) == ("years", True)
    (found,) = merge_reviews(
        [feature(0)], [relabel, late, line("dan", accept=False, shown="years")]
    )
    assert not found.high_confidence


def test_a_persons_label_does_not_keep_the_old_labels_confidence() -> None:
    given = {"sae_digest": "abc", "latent": 0}
    better = ReviewLine(**given, reviewer="bob", label="years")
    (found,) = merge_reviews([feature(0, 0.05)], [better])
    assert found.confidence == pytest.approx(2 / 3)  # one of one for it, smoothed
    assert found.confidence_low == pytest.approx(0.2065, abs=1e-3)  # Wilson, 1 of 1
    assert found.confidence_high == pytest.approx(1)
    others = [ReviewLine(**given, reviewer=r, accept=False, shown="years") for r in ("ann", "cem")]
    (found,) = merge_reviews([feature(0, 0.05)], [better, *others])
    assert found.confidence == pytest.approx(2 / 5)
    assert found.confidence_low <= found.confidence <= found.confidence_high


def _recalibrated(features: list[FeatureLabel], tau: float | None) -> Recalibrated:
    """For features whose labels are still the labeler's own."""
    return recalibrated(features, features, tau)


def _audited(count: int, accept_below: float, audit: bool = True) -> list[FeatureLabel]:
    rng = np.random.default_rng(0)
    out = []
    for latent in range(count):
        p = float(rng.uniform(0.05, 0.95))
        verdict = {
            "reviewer": "ann",
            "accept": bool(rng.random() < accept_below * p),
            "audit": audit,
        }
        out.append(feature(latent, p, reviews=[verdict]))
    return out


def test_audit_verdicts_recalibrate() -> None:
    features = [*_audited(200, accept_below=0.4), feature(500, 0.9)]
    found, tau, people = _recalibrated(features, tau=0.3)
    assert found[-1].confidence < 0.6
    assert found[-1].confidence_low <= found[-1].confidence <= found[-1].confidence_high
    assert tau is None  # people accept too few for any threshold
    assert not found[-1].high_confidence
    assert all(
        f.high_confidence == g.high_confidence for f, g in zip(found, features[:-1], strict=False)
    )
    assert people is not None
    assert people.n == 200
    assert people.high_confidence_threshold is None
    # The raw p overstate by a factor of 2.5; out of fold the refitted ones do not.
    assert people.ece < 0.1 < people.before.ece
    assert people.brier < people.before.brier


def test_the_threshold_is_refitted_to_people() -> None:
    """People accept whatever the labeler gives at least 0.4: less than its own threshold."""
    rng = np.random.default_rng(1)
    features = []
    for latent, p in enumerate(rng.uniform(0.05, 0.95, 300)):
        verdict = {"reviewer": "ann", "accept": bool(p >= 0.4), "audit": True, "shown": OWN}
        features.append(feature(latent, float(p), reviews=[verdict]))
    waiting = [feature(500, 0.6), feature(501, 0.1)]
    found, tau, people = _recalibrated([*features, *waiting], tau=0.9)
    assert people is not None
    assert tau == people.high_confidence_threshold is not None
    assert [f.high_confidence for f in found[-2:]] == [True, False]
    # The same verdicts on labels of an earlier run: nothing to learn from.
    stale = [
        f.model_copy(update={"reviews": [f.reviews[0].model_copy(update={"shown": "old"})]})
        for f in features
    ]
    assert _recalibrated([*stale, *waiting], 0.9) == ([*stale, *waiting], 0.9, None)


def test_queue_verdicts_and_few_verdicts_do_not_recalibrate() -> None:
    for features in (_audited(200, 0.4, audit=False), _audited(10, 0.4)):
        assert _recalibrated(features, tau=0.5) == (features, 0.5, None)


def _verdicts(rejection: dict[str, Any], repeats: int = 1) -> list[FeatureLabel]:
    """100 labels in the audit: every second is accepted, the others get `rejection`."""
    lines = []
    for n in range(100):
        said = {"accept": True} if n % 2 else rejection
        line = ReviewLine(sae_digest="abc", latent=n, reviewer="ann", audit=True, **said)
        lines += [line] * (repeats if n % 2 else 1)
    return [*merge_reviews(DRAFTED[:100], lines), DRAFTED[100]]


def test_rejections_that_come_with_a_better_label_recalibrate_too() -> None:
    plain = recalibrated(_verdicts({"accept": False}), DRAFTED, 0.5).features[-1].confidence
    assert plain < 0.7
    for rejection in ({"accept": False, "label": "years"}, {"label": "years"}):
        features = _verdicts(rejection)
        assert features[0].predicate is None  # the label that was judged is gone
        found = recalibrated(features, DRAFTED, 0.5).features
        assert found[-1].confidence == pytest.approx(plain)
        assert found[0] == features[0]  # a person's label is not moved by verdicts on others


def test_a_latent_counts_once_however_often_it_was_judged() -> None:
    once, often = (_verdicts({"accept": False}, repeats) for repeats in (1, 5))
    last = recalibrated(once, DRAFTED, 0.5).features[-1]
    assert recalibrated(often, DRAFTED, 0.5).features[-1] == last
    # The last verdict on the labeler's own label counts; those on a person's words do not.
    own = {"reviewer": "ann", "accept": False, "audit": True}
    better = {"reviewer": "bob", "label": "years"}
    for praised, same in ((None, True), ("years", True), (OWN, False)):
        praise = {"reviewer": "cem", "accept": True, "audit": True, "shown": praised}
        lines = [ReviewLine(sae_digest="abc", latent=0, **said) for said in (own, better, praise)]
        (merged,) = merge_reviews([DRAFTED[0]], lines)
        found = recalibrated([merged, *once[1:]], DRAFTED, 0.5).features[-1]
        assert (found == last) == same, praised
