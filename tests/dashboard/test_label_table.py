"""The table of labels and their controls."""

from __future__ import annotations

from typing import Any

from rldecoder.dashboard.label_table import (
    GAPS,
    METHODS,
    NONE,
    SCORES,
    WORD_GAPS,
    WORDS,
    label_columns,
    label_rows,
)
from rldecoder.interp.label_controls import LabelControls


def method(value: float, **more: Any) -> dict[str, Any]:
    means = {f"mean_{name}": value for name in SCORES}
    counts = {"latents": 1200, "labelled": 7, "failed": 1193, "accepted": 3}
    return {**counts, **means, "mean_f1_labelled": value, "interval_f1": None, **more}


def controls(**changes: Any) -> LabelControls:
    """A record with these parts; the table reads no other."""
    empty = {"n": 0, "ece": None, "brier": None, "bins": []}
    share = {"value": None, "low": 0.0, "high": 1.0}
    coverage = {
        "threshold": None, "labels": 0, "coverage": share, "accepted": 0, "precision": share,
    }  # fmt: skip
    return LabelControls.model_validate(
        {
            "methods": {"label": method(0.5)}, "gaps": {"label_shuffled": {}},
            "acceptance": {"detection": 0.8, "precision": 0.5},
            "calibration": {
                "model": "base_rate", "fit_rows": 1, "fit_accepted": 0,
                "high_confidence_threshold": None, "precision_bar": 0.8, "best_lower_bound": None,
                "high_confidence": coverage, "at_point_estimate": coverage,
                "best_possible_coverage": 0.0, "test": empty, "fit_out_of_fold": empty,
                "people": None,
            },
            **changes,
        }
    )  # fmt: skip


def gap(difference: float, low: float, high: float) -> dict[str, float]:
    return {
        "difference": difference, "low": low, "high": high, "latents": 3, "control_latents": 3,
    }  # fmt: skip


def test_rows_have_their_heads_order_and_intervals() -> None:
    record = controls(
        methods={
            "random_sae": method(0.25),
            "label": method(0.5, interval_detection=[0.4, 0.6], mean_auprc=None),
        },
        gaps={
            "label_shuffled": {},
            "drawn_random_sae": {"detection": gap(0.1, -0.05, 0.25), "f1": None},
        },
    )
    label, random, between = label_rows(record)
    heads = label_columns()
    assert len(label) == len(random) == len(between) == len(heads) == 4 + len(SCORES)
    shown = dict(zip(heads, label, strict=True))
    assert label[:4] == [METHODS["label"], "1,200", "7", "3"]
    assert shown["detection"] == "0.50 [0.40, 0.60]"
    assert shown["fuzzing"] == "0.50"
    assert shown["AUPRC"] == NONE
    assert random[0] == METHODS["random_sae"]
    shown = dict(zip(heads, between, strict=True))
    assert between[:4] == [GAPS["drawn_random_sae"], NONE, NONE, NONE]
    assert shown["detection"] == "0.10 [-0.05, 0.25]"
    assert shown["F1"] == shown["intruder"] == NONE


def test_labels_without_controls_have_a_row_and_no_gaps() -> None:
    assert [row[0] for row in label_rows(controls())] == [METHODS["label"]]


def test_labels_in_words_have_rows_of_their_own() -> None:
    judged = {"labelled": 1, "failed": 0, "judge_questions": 1, "judge_failures": 0}
    between = {"detection": gap(0.3, 0.2, 0.4), "intruder": None}
    llm = {
        **judged, "latents": 9, "labelled": 8, "mean_detection": 0.7,
        "interval_detection": [0.6, 0.8], "mean_intruder": None, "mean_simulation": 0.25,
        "mean_detection_labelled": 0.7, "shuffled_latents": 5, "mean_detection_shuffled": 0.5,
        "mean_simulation_shuffled": 0.0,
        "controls": {
            name: {**judged, "latents": 3, "mean_detection": 0.1, "mean_detection_labelled": 0.1,
                   "interval_detection": None}
            for name in ("random_sae", "drawn")
        },
        "gaps": dict.fromkeys(("label_shuffled", "label_random_sae", "drawn_random_sae"), between),
        "labeler": "m", "attempts": 1, "cached_answers": 0, "tokens_in": 1, "tokens_out": 1,
        "cost": 0.0, "confidence": {"reason": "few", "ece": None, "brier": None},
        "judge": {
            "model": "m", "trusted": True, "reason": None, "planted": 1, "bar": 0.7,
            "tolerance": 0.1, "questions": 1, "failures": 0,
        },
    }  # fmt: skip
    first, *rows = label_rows(controls(llm=llm))
    assert first[0] == METHODS["label"]
    assert [row[0] for row in rows] == [*WORDS.values(), *WORD_GAPS.values()]
    own, shuffled, drawn, random, paired, unpaired = (
        dict(zip(label_columns(), row, strict=True)) for row in rows
    )
    assert (own["latents"], own["labelled"], own["accepted on test"]) == ("9", "8", NONE)
    assert (own["detection"], own["intruder"]) == ("0.70 [0.60, 0.80]", NONE)
    assert (own["simulation r"], own["F1"]) == ("0.25", NONE)
    assert (shuffled["latents"], shuffled["detection"]) == ("5", "0.50")
    assert shuffled["simulation r"] == "0.00"
    assert drawn["detection"] == random["detection"] == "0.10"
    assert paired["detection"] == unpaired["detection"] == "0.30 [0.20, 0.40]"
