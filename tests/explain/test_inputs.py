"""What explanations know of latents."""

from __future__ import annotations

import pyarrow as pa
import pytest

from rldecoder.explain.inputs import LabelText, label_texts, mean_importance
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


def test_labels_by_latent_failures_without_text() -> None:
    labels = FeatureLabels(
        model_name="m", hook_layer=1, num_latents=9, sae_digest="d", requested=3,
        features=[label(4, "digits"), label(7, None), label(8, "unsure")], labelled=2, failed=1,
        high_confidence_threshold=None, coverage=0.0,
    )  # fmt: skip
    expected = {
        4: LabelText("digits", 0.5, True),
        7: LabelText(
            None, None, description="not labelled; fires on none of the text that was read"
        ), 8: LabelText("unsure", 0.5),
    }  # fmt: skip
    assert label_texts(labels) == expected
    assert (expected[8].quoted, expected[8].unsure) == (None, "unsure")
    assert (expected[4].quoted, expected[4].unsure) == ("digits", None)


def test_importance_is_the_mean_over_domains_with_missing_rows_as_zero() -> None:
    table = pa.table(
        {
            "latent": [0, 2, 2, 2],
            "domain": ["label", "label", "ood", "label"],
            "target": ["decoder", "decoder", "decoder", "frozen"],
            "importance": [0.4, 0.2, 0.6, 9.0],
            "signed": [0.0] * 4,
            "count": [1, 100, 1, 5],
        },
        schema=IMPORTANCE,
    )
    assert mean_importance(table, 4).tolist() == pytest.approx([0.2, 0.0, 0.4, 0.0])
    assert mean_importance(table, 4, "frozen").tolist() == [0.0, 0.0, 9.0, 0.0]
