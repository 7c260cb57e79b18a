from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import rldecoder.interp.records as records
from rldecoder.errors import DamagedFileError
from rldecoder.interp.predicate import TokenClass
from rldecoder.interp.records import FeatureLabel, FeatureLabels, Scores
from rldecoder.interp.shown import shown


def feature(**changes: Any) -> FeatureLabel:
    """A labelled feature with every field set."""
    values: dict[str, Any] = {
        "latent": 5,
        "status": "labelled",
        "label": "token is a number",
        "failure": None,
        "predicate": TokenClass(name="number"),
        "labeler": "predicate-1",
        "confidence": 0.7,
        "confidence_low": 0.6,
        "confidence_high": 0.8,
        "high_confidence": False,
        "importance": 0.02,
        "importance_rank": 1,
        "density": 0.01,
        "scores": Scores(
            detection=0.9, fuzzing=None, precision=0.5, recall=0.5, f1=0.5, auprc=0.3, firings=9
        ),
        "examples": [],
        "promoted": [{"token": "</script>", "token_id": 3, "effect": 1.5}],
        "suppressed": [],
        "audit": False,
    }
    return FeatureLabel.model_validate(values | changes)


def labels(features: list[FeatureLabel]) -> FeatureLabels:
    """A file with these features."""
    return FeatureLabels(
        model_name="tiny",
        hook_layer=2,
        num_latents=96,
        sae_digest="abc",
        requested=10,
        features=features,
        labelled=1,
        failed=0,
        high_confidence_threshold=None,
        coverage=0.0,
    )


def test_committed_schema_is_the_models_own() -> None:
    path = Path(records.__file__).parent / "feature_labels.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == FeatureLabels.model_json_schema(), (
        "the format of feature_labels.json changed: raise SCHEMA_VERSION and commit the new schema"
    )


def test_round_trip(tmp_path: Path) -> None:
    written = labels([feature()])
    written.save(tmp_path / "feature_labels.json")
    assert FeatureLabels.load(tmp_path / "feature_labels.json") == written
    raw = json.loads((tmp_path / "feature_labels.json").read_text(encoding="utf-8"))
    assert raw["schema_version"] == records.SCHEMA_VERSION == 4
    assert raw["schema_minor"] == 0  # only the stage that knows all fields claims the newest
    assert raw["features"][0]["predicate"] == {"kind": "token_class", "name": "number", "offset": 0}


@pytest.mark.parametrize(
    "changes",
    [
        {"label": None},
        {"failure": "too few"},
        {"status": "failed"},
        {"status": "failed", "label": None},
        {"confidence": 1.2},
        {"verdict": "good"},
    ],
)
def test_inconsistent_features_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        feature(**changes)


def other_label(**changes: Any) -> dict[str, Any]:
    """A label by a language model."""
    values: dict[str, Any] = {
        "labeler": "llm-1", "model": "m", "label": "numbers", "failure": None, "judge": "m",
        "judge_trusted": False,
        "scores": {"detection": 0.5, "fuzzing": None, "window_precision": 0.1, "questions": 2,
                   "failures": 1},
        "confidence": None, "no_confidence": "too few",
    }  # fmt: skip
    return values | changes


def test_files_from_before_labels_in_words_are_read(tmp_path: Path) -> None:
    labels([feature()]).save(tmp_path / "feature_labels.json")
    path = tmp_path / "feature_labels.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    del raw["schema_minor"], raw["judge"], raw["features"][0]["other_labels"]
    path.write_text(json.dumps(raw), encoding="utf-8")
    old = FeatureLabels.load(tmp_path / "feature_labels.json")
    assert (old.schema_minor, old.judge, old.features[0].other_labels) == (0, None, [])


def test_reviews_from_before_they_named_the_label_are_read(tmp_path: Path) -> None:
    labels([feature(reviews=[{"reviewer": "ann", "accept": True}])]).save(
        tmp_path / "feature_labels.json"
    )
    path = tmp_path / "feature_labels.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    del raw["features"][0]["reviews"][0]["shown"], raw["features"][0]["reviews"][0]["at"]
    path.write_text(json.dumps(raw), encoding="utf-8")
    (review,) = FeatureLabels.load(tmp_path / "feature_labels.json").features[0].reviews
    assert (review.shown, review.at) == (None, None)
    assert review.judges("token is a number")


def test_labels_in_words_stand_beside_the_own_one(tmp_path: Path) -> None:
    both = feature(other_labels=[other_label(), other_label(label=None, failure="refused")])
    labels([both]).save(tmp_path / "feature_labels.json")
    [found] = FeatureLabels.load(tmp_path / "feature_labels.json").features
    assert (found.label, found.labeler) == ("token is a number", "predicate-1")
    assert [(o.label, o.failure) for o in found.other_labels] == [
        ("numbers", None), (None, "refused"),
    ]  # fmt: skip
    sure = {"p": 0.5, "low": 0.4, "high": 0.6}
    feature(other_labels=[other_label(confidence=sure, no_confidence=None)])
    for wrong in (
        {"failure": "refused"}, {"label": None}, {"confidence": sure}, {"no_confidence": None},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            feature(other_labels=[other_label(**wrong)])


def test_a_file_of_version_3_is_read_and_shown() -> None:
    path = Path(__file__).parent / "feature_labels_v3.json"
    assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == 3
    old = FeatureLabels.load(path)
    assert old.schema_version == 4
    assert [f.input for f in old.features] == [f.output for f in old.features] == [None] * 3
    assert [f.kind for f in old.features] == ["none", "input", "none"]
    said = [shown(f) for f in old.features]
    assert [s.is_label for s in said] == [False, True, False]
    assert said[1].text == old.features[1].label
    for feature, words in zip(old.features, said, strict=True):
        if not words.is_label:
            assert words.text.startswith("not labelled; fires most strongly on ")
            assert "raises" in words.text
            assert feature.label is None or feature.label not in words.text
    again = FeatureLabels.model_validate(old.model_dump(mode="json"))
    assert again == old


def test_another_schema_version_is_a_clear_error(tmp_path: Path) -> None:
    labels([feature()]).save(tmp_path / "feature_labels.json")
    path = tmp_path / "feature_labels.json"
    path.write_text(path.read_text().replace('"schema_version": 4', '"schema_version": 2'))
    with pytest.raises(DamagedFileError, match="schema_version: Input should be 4"):
        FeatureLabels.load(tmp_path / "feature_labels.json")
