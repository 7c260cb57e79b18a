"""A small report's data, with hostile text wherever text from outside can stand."""

from __future__ import annotations

from typing import Any

import pytest

from rldecoder.dashboard import figures
from rldecoder.dashboard.report import FigureEntry, ReportData
from rldecoder.evals.targets import TARGETS, Measurement, fill_targets

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&amp;{{7*7}}"


def example(text: str) -> dict[str, Any]:
    prediction = {"token": text, "p": 0.5, "then": [(text, 0.25)]}
    return {
        "prompt": text, "cut": True, "kl": 0.3, "frozen": prediction,
        "decoder": prediction, "agree": True, "method_a": text, "method_b": text,
        "claims": [
            {"sentence": text, "verdict": "supported", "css": "supported", "effect": 0.5,
             "frozen_effect": -0.1, "frozen_noise": 0.15, "noise": 0.1},
            {"sentence": text, "verdict": "too small to tell", "css": "too-small-to-tell",
             "effect": 0.0, "frozen_effect": None, "frozen_noise": None, "noise": 0.1},
        ],
        "sanity": {"claimed_removed": 1.0, "claimed_predicted": 0.9, "others_removed": 0.1},
    }  # fmt: skip


def other(label: str | None, text: str) -> dict[str, Any]:
    return {
        "labeler": text, "model": text, "label": label, "failure": None if label else text,
        "judge": text, "trusted": False,
        "scores": {"detection": 0.625, "fuzzing": None, "window_precision": 0.25, "questions": 2,
                   "failures": 1},
        "confidence": [0.25, 0.125, 0.5] if label else None,
        "no_confidence": None if label else text,
    }  # fmt: skip


def feature(latent: int, text: str, label: str | None) -> dict[str, Any]:
    names = (
        "detection", "fuzzing", "precision", "recall", "f1", "auprc", "detection_hard",
        "fuzzing_hard", "intruder", "simulation",
    )  # fmt: skip
    scores = {name: n / 100 for n, name in enumerate(names, start=11)} | {"fuzzing": None}
    return {
        "shown": label or f"not labelled; {text}", "is_label": label is not None,
        "kind": "output" if label else "none", "tried": [[text, text]],
        "latent": latent, "label": label, "failure": None if label else text,
        "predicate": text, "labeler": text, "confidence": 0.4, "high": latent == 2,
        "importance": 0.1, "rank": latent + 1, "queue": 9 - latent, "density": 0.01,
        "scores": scores, "others": [other(text, text), other(None, text)],
        "promoted": [text], "suppressed": [text],
        "examples": [{"kind": kind, "tokens": ["a", text, "b"], "heat": [0.0, 1.0, 0.3],
                      "act": 2.0, "focus": 1} for kind in ("top", "quantile", "near_miss")],
        "reviews": [{"reviewer": text, "accept": False, "label": text, "note": text, "at": text}],
        "relations": {"cluster": {"size": 2, "members": [latent, 7]}, "flags": [text]},
    }  # fmt: skip


@pytest.fixture
def data() -> ReportData:
    line = figures.line_plot(
        [figures.Line("one", [1, 2], [0.5, 0.2])], x_label="step", y_label="KL"
    )
    text = HOSTILE
    stage = {
        "name": "train_sae", "digest": "abc123def456", "verdict": None, "wall": "3.0 s",
        "metrics": [(text, text)],
    }  # fmt: skip
    measured = {"kl_supervised": Measurement(0.9, text), "mse": Measurement(0.5)}
    targets = fill_targets(measured, {target.source: "evaluate" for target in TARGETS})
    row = {
        "model": text, "split": "test", "kl": 0.5, "kl_low": 0.4, "kl_high": 0.6,
        "agreement": 0.7, "accuracy": 0.3, "frozen_accuracy": 0.4, "num_tokens": 1000,
    }  # fmt: skip
    task = {
        "task": "addition", "model": text, "score": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 9,
    }  # fmt: skip
    return ReportData(
        title=text,
        subtitle=text,
        facts=[{"name": text, "value": text, "more": text}],
        caveats=[text],
        targets=[row.model_dump() for row in targets.root],
        pipeline=[{"title": "Prepare", "stages": [stage]}],
        faithfulness=[row],
        tasks=[task],
        freeze_note=text,
        controls={"columns": ("a", "b"), "rows": [(text, text)], "verdict": "pass",
                  "reasons": text},
        label_columns=[text] * 12,
        label_methods=[[text] * 12],
        claim_methods=[[text] * 8],
        claim_note=text,
        simulation_columns=[text] * 3,
        simulation_rows=[[text] * 3],
        simulation_note=text,
        examples=[example(text)],
        features=[feature(0, text, text), feature(1, text, None), feature(2, "plain", "months")],
        configs=[{"stage": "train_sae", "digest": "abc", "config": [(text, text)]}],
        figures={"lens": FigureEntry(line, text, text)},
    )  # fmt: skip
