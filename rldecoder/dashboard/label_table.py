"""The report's table of labels and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rldecoder.dashboard.collect import format_value

METHODS = {
    "label": "labels of the most important latents",
    "shuffled": "control: shuffled labels",
    "drawn": "labels of latents drawn uniformly",
    "random_sae": "control: random SAE, drawn alike",
}
GAPS = {
    "label_shuffled": "gap: labels above shuffled",
    "drawn_random_sae": "gap: drawn above random SAE",
}
WORDS = {
    "label": "in words, by a language model",
    "shuffled": "in words, control: shuffled labels",
    "drawn": "in words, latents drawn uniformly",
    "random_sae": "in words, control: random SAE, drawn alike",
}
WORD_GAPS = {
    "label_shuffled": "in words, gap: labels above shuffled",
    "drawn_random_sae": "in words, gap: drawn above random SAE",
}
SCORES = {
    "detection": "detection",
    "detection_hard": "on near misses",
    "fuzzing": "fuzzing",
    "fuzzing_hard": "on near misses",
    "intruder": "intruder",
    "simulation": "simulation r",
    "f1": "F1",
    "auprc": "AUPRC",
}
NONE = "–"


def label_columns() -> list[str]:
    """Heads of the columns."""
    return ["labels", "latents", "labelled", "accepted on test", *SCORES.values()]


def label_rows(controls: Mapping[str, Any]) -> list[list[str]]:
    """One row a method, failures counting 0, with intervals where there are any; then the gaps.

    The same follows of labels in words, if there are any: their scores are a judge's answers about
    some windows, and not to be compared with those of the rows above.

    Args:
        controls: content of controls.json.
    """
    rows = _rows(controls["methods"], METHODS, controls.get("gaps", {}), GAPS)
    llm = controls.get("llm")
    if llm is None:
        return rows
    count = llm["shuffled_latents"]
    shuffled = {f"mean_{name}": llm.get(f"mean_{name}_shuffled") for name in SCORES}
    methods = {
        "label": llm,
        "shuffled": {"latents": count, "labelled": count, **shuffled},
        **llm.get("controls", {}),
    }
    return rows + _rows(methods, WORDS, llm.get("gaps", {}), WORD_GAPS)


def _rows(
    methods: Mapping[str, Mapping[str, Any]],
    method_names: Mapping[str, str],
    gaps: Mapping[str, Mapping[str, Any]],
    gap_names: Mapping[str, str],
) -> list[list[str]]:
    rows = [_method(shown, methods[key]) for key, shown in method_names.items() if key in methods]
    return rows + [_gap(shown, gaps[key]) for key, shown in gap_names.items() if key in gaps]


def _method(shown: str, found: Mapping[str, Any]) -> list[str]:
    counts = [
        format_value(found[name]) if name in found else NONE
        for name in ("latents", "labelled", "accepted")
    ]
    scores = [_number(found.get(f"mean_{name}"), found.get(f"interval_{name}")) for name in SCORES]
    return [shown, *counts, *scores]


def _gap(shown: str, found: Mapping[str, Any]) -> list[str]:
    scores = []
    for name in SCORES:
        gap = found.get(name)
        scores.append(
            NONE if gap is None else _number(gap["difference"], (gap["low"], gap["high"]))
        )
    return [shown, NONE, NONE, NONE, *scores]


def _number(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return NONE
    ends = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{value:.2f}{ends}"
