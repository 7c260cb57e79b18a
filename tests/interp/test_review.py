from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rldecoder.errors import BadInputError
from rldecoder.interp.predicate import TokenClass
from rldecoder.interp.records import FeatureLabel, Scores
from rldecoder.interp.review import (
    ReviewLine,
    merge_reviews,
    read_reviews,
    recalibrated,
)


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


@pytest.mark.parametrize("line", ["{", '{"latent": 1}', "[]"])
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
    found = recalibrated(features, tau=0.3)
    assert found[-1].confidence < 0.6
    assert found[-1].confidence_low <= found[-1].confidence <= found[-1].confidence_high
    assert found[-1].high_confidence == (found[-1].confidence >= 0.3)
    assert all(
        f.high_confidence == g.high_confidence for f, g in zip(found, features[:-1], strict=False)
    )


def test_queue_verdicts_and_few_verdicts_do_not_recalibrate() -> None:
    for features in (_audited(200, 0.4, audit=False), _audited(10, 0.4)):
        assert recalibrated(features, tau=0.5) == features


def _verdicts(rejection: dict[str, Any], repeats: int = 1) -> list[FeatureLabel]:
    """100 labels in the audit: every second is accepted, the others get `rejection`."""
    features = [feature(n, 0.2 + 0.006 * n) for n in range(100)]
    lines = []
    for n in range(100):
        said = {"accept": True} if n % 2 else rejection
        line = ReviewLine(sae_digest="abc", latent=n, reviewer="ann", audit=True, **said)
        lines += [line] * (repeats if n % 2 else 1)
    return [*merge_reviews(features, lines), feature(500, 0.8)]


def test_rejections_that_come_with_a_better_label_recalibrate_too() -> None:
    plain = recalibrated(_verdicts({"accept": False}), tau=0.5)[-1].confidence
    assert plain < 0.7
    for rejection in ({"accept": False, "label": "years"}, {"label": "years"}):
        features = _verdicts(rejection)
        assert features[0].predicate is None  # the label that was judged is gone
        assert recalibrated(features, tau=0.5)[-1].confidence == pytest.approx(plain)


def test_a_latent_counts_once_however_often_it_was_judged() -> None:
    once, often = (_verdicts({"accept": False}, repeats) for repeats in (1, 5))
    assert recalibrated(often, 0.5)[-1].confidence == recalibrated(once, 0.5)[-1].confidence
    # The last verdict on the labeler's own label counts; those on a person's words do not.
    own = {"reviewer": "ann", "accept": False, "audit": True}
    better = {"reviewer": "bob", "label": "years"}
    praise = {"reviewer": "cem", "accept": True, "audit": True}
    lines = [ReviewLine(sae_digest="abc", latent=0, **said) for said in (own, better, praise)]
    (merged,) = merge_reviews([feature(0, 0.2)], lines)
    assert recalibrated([merged, *once[1:]], 0.5)[-1] == recalibrated(once, 0.5)[-1]
