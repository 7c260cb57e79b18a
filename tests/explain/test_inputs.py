"""What explanations read of other stages' artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rldecoder import schemas
from rldecoder.errors import DamagedFileError
from rldecoder.explain.inputs import LabelText, read_importance, read_labels
from rldecoder.interp.records import FeatureLabel, FeatureLabels, Scores
from rldecoder.interp.tally import IMPORTANCE


def label(latent: int, text: str | None) -> FeatureLabel:
    nothing = dict.fromkeys(Scores.model_fields, None) | {"firings": 0}
    return FeatureLabel(
        latent=latent, status="labelled" if text else "failed", label=text,
        failure=None if text else "rare", predicate=None, labeler="t",
        confidence=0.5 if text else 0.0, confidence_low=0.0, confidence_high=1.0,
        high_confidence=text == "digits", importance=1.0, importance_rank=1, density=0.0,
        scores=Scores(**nothing), examples=[], promoted=[], suppressed=[], audit=False,
    )  # fmt: skip


def test_labels_by_latent_failures_without_text(tmp_path: Path) -> None:
    FeatureLabels(
        model_name="m", hook_layer=1, num_latents=9, sae_digest="d", requested=3,
        features=[label(4, "digits"), label(7, None), label(8, "unsure")], labelled=2, failed=1,
        high_confidence_threshold=None, coverage=0.0,
    ).save(tmp_path / "labels.json")  # fmt: skip
    expected = {
        4: LabelText("digits", 0.5, True), 7: LabelText(None, 0.0), 8: LabelText("unsure", 0.5),
    }  # fmt: skip
    assert read_labels(tmp_path / "labels.json") == expected
    assert (expected[8].quoted, expected[8].unsure) == (None, "unsure")
    assert (expected[4].quoted, expected[4].unsure) == ("digits", None)


def test_damaged_labels_are_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text('{"schema_version": 99}')
    with pytest.raises(DamagedFileError, match="schema_version"):
        read_labels(path)


def test_importance_is_the_mean_over_domains_with_missing_rows_as_zero(tmp_path: Path) -> None:
    path = tmp_path / "importance.parquet"
    schemas.write_parquet(
        path,
        {
            "latent": [0, 2, 2, 2],
            "domain": ["label", "label", "ood", "label"],
            "target": ["decoder", "decoder", "decoder", "frozen"],
            "importance": [0.4, 0.2, 0.6, 9.0],
            "signed": [0.0] * 4,
            "count": [1, 100, 1, 5],
        },
        IMPORTANCE,
    )
    assert read_importance(path, 4).tolist() == pytest.approx([0.2, 0.0, 0.4, 0.0])
    assert read_importance(path, 4, "frozen").tolist() == [0.0, 0.0, 9.0, 0.0]
