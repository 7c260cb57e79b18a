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


def method(value: float, **more: Any) -> dict[str, Any]:
    means = {f"mean_{name}": value for name in SCORES}
    return {"latents": 1200, "labelled": 7, "accepted": 3, **means, **more}


def test_rows_have_their_heads_order_and_intervals() -> None:
    controls = {
        "methods": {
            "random_sae": method(0.25),
            "label": method(0.5, interval_detection=[0.4, 0.6], mean_auprc=None),
        },
        "gaps": {
            "drawn_random_sae": {
                "detection": {"difference": 0.1, "low": -0.05, "high": 0.25},
                "f1": None,
            }
        },
    }
    label, random, gap = label_rows(controls)
    heads = label_columns()
    assert len(label) == len(random) == len(gap) == len(heads) == 4 + len(SCORES)
    shown = dict(zip(heads, label, strict=True))
    assert label[:4] == [METHODS["label"], "1,200", "7", "3"]
    assert shown["detection"] == "0.50 [0.40, 0.60]"
    assert shown["fuzzing"] == "0.50"
    assert shown["AUPRC"] == NONE
    assert random[0] == METHODS["random_sae"]
    shown = dict(zip(heads, gap, strict=True))
    assert gap[:4] == [GAPS["drawn_random_sae"], NONE, NONE, NONE]
    assert shown["detection"] == "0.10 [-0.05, 0.25]"
    assert shown["F1"] == shown["intruder"] == NONE


def test_labels_of_an_older_program_have_no_gaps() -> None:
    assert [row[0] for row in label_rows({"methods": {"label": method(0.5)}})] == [METHODS["label"]]


def test_labels_in_words_have_rows_of_their_own() -> None:
    gap = {"difference": 0.3, "low": 0.2, "high": 0.4}
    llm = {
        "latents": 9, "labelled": 8, "mean_detection": 0.7, "interval_detection": [0.6, 0.8],
        "mean_intruder": None, "mean_simulation": 0.25, "shuffled_latents": 5,
        "mean_detection_shuffled": 0.5, "mean_simulation_shuffled": 0.0,
        "controls": {name: {"latents": 3, "labelled": 1, "mean_detection": 0.1}
                     for name in ("random_sae", "drawn")},
        "gaps": {name: {"detection": gap, "intruder": None}
                 for name in ("label_shuffled", "label_random_sae", "drawn_random_sae")},
    }  # fmt: skip
    first, *rows = label_rows({"methods": {"label": method(0.5)}, "llm": llm})
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
