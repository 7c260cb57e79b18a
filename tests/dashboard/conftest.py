"""A small report's data, with hostile text wherever text from outside can stand."""

from __future__ import annotations

import pytest

from rldecoder.dashboard import figures
from rldecoder.dashboard.cards import FeatureCard, OtherLabelShown
from rldecoder.dashboard.collect import ConfigShown, PhaseShown, StageShown
from rldecoder.dashboard.opening import Sentence
from rldecoder.dashboard.report import (
    ControlsShown,
    Fact,
    FaithfulnessRow,
    FigureEntry,
    HarnessShown,
    ReportData,
)
from rldecoder.dashboard.shown import ExampleShown
from rldecoder.evals.comparison import TaskScore
from rldecoder.evals.targets import TARGETS, Measurement, fill_targets
from rldecoder.explain.explanation import Prediction
from rldecoder.interp.records import LabelConfidence

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&amp;{{7*7}}"


def example(text: str) -> ExampleShown:
    prediction = Prediction(text, 1, 0.5, ((text, 0.5), (text, 0.25)))
    values = {
        "prompt": text, "cut": True, "kl": 0.3, "frozen": prediction,
        "decoder": prediction, "agree": True, "active": [(text, "0.75", text)], "says": text,
        "claims": [
            {"sentence": text, "verdict": "supported", "css": "supported",
             "measured": text, "change": -0.5, "decoder_change": 0.1, "noise": 0.1},
        ],
        "more_claims": [
            {"sentence": text, "verdict": "too small to tell", "css": "too-small-to-tell",
             "measured": text, "change": 0.0, "decoder_change": 0.0, "noise": 0.1},
        ],
        "tested": text,
    }  # fmt: skip
    return ExampleShown.model_validate(values)


def other(label: str | None, text: str) -> OtherLabelShown:
    values = {
        "labeler": text, "model": text, "label": label, "failure": None if label else text,
        "judge": text, "judge_trusted": False,
        "scores": {"detection": 0.625, "fuzzing": None, "window_precision": 0.25, "questions": 2,
                   "failures": 1}.items(),
        "confidence": LabelConfidence(p=0.25, low=0.125, high=0.5) if label else None,
        "no_confidence": None if label else text,
    }  # fmt: skip
    return OtherLabelShown.model_validate(values)


def feature(latent: int, text: str, label: str | None) -> FeatureCard:
    names = (
        "detection", "fuzzing", "precision", "recall", "f1", "auprc", "detection_hard",
        "fuzzing_hard", "intruder", "simulation",
    )  # fmt: skip
    scores = {name: n / 100 for n, name in enumerate(names, start=11)} | {"fuzzing": None}
    values = {
        "shown": label or f"not labelled; {text}", "is_label": label is not None,
        "kind": "output" if label else "none", "tried": [[text, text]],
        "latent": latent, "label": label, "failure": None if label else text,
        "predicate": text, "labeler": text, "confidence": 0.4,
        "confidence_low": 0.3, "confidence_high": 0.5, "high": latent == 2,
        "importance": 0.1, "rank": latent + 1, "queue": 9 - latent, "density": 0.01,
        "scores": scores.items(), "others": [other(text, text), other(None, text)],
        "promoted": [text], "suppressed": [text],
        "examples": [{"kind": kind, "tokens": ["a", text, "b"], "heat": [0.0, 1.0, 0.3],
                      "act": 2.0, "focus": 1} for kind in ("top", "quantile", "near_miss")],
        "reviews": [{"reviewer": text, "accept": False, "label": text, "note": text, "at": text}],
        "relations": {"cluster": {"size": 2, "members": [latent, 7]}, "flags": [text]},
    }  # fmt: skip
    return FeatureCard.model_validate(values)


@pytest.fixture
def data() -> ReportData:
    line = figures.line_plot(
        [figures.Line("one", [1, 2], [0.5, 0.2])], x_label="step", y_label="KL"
    )
    text = HOSTILE
    stage = StageShown("train_sae", "abc123def456", None, "3.0 s", [(text, text)])
    measured = {"kl_supervised": Measurement(0.9, text), "mse": Measurement(0.5)}
    targets = fill_targets(measured, {target.source: "evaluate" for target in TARGETS})
    row = FaithfulnessRow(
        model=text, split="test", kl=0.5, kl_low=0.4, kl_high=0.6, ce=3.0, frozen_ce=2.5,
        agreement=0.7, accuracy=0.3, frozen_accuracy=0.4, ece=0.1, num_tokens=1000,
        num_labels=990, num_sequences=10,
    )  # fmt: skip
    task = TaskScore(
        task="addition", model=text, score=0.5, ci_low=0.4, ci_high=0.6, n=9, drop=0.0,
        drop_low=0.0, drop_high=0.0,
    )  # fmt: skip
    return ReportData(
        title=text,
        subtitle=text,
        opening=[Sentence("Decoded:", text)],
        facts=[Fact(text, text, text)],
        caveats=[text],
        targets=targets.root,
        pipeline=[PhaseShown("Prepare", [stage])],
        faithfulness=[row],
        tasks=[task],
        freeze_note=text,
        controls=ControlsShown(("a", "b"), [(text, text)], "pass", text),
        harness=HarnessShown([text] * 9, [[text] * 9], text),
        label_columns=[text] * 12,
        label_methods=[[text] * 12],
        claim_columns=[text] * 9,
        claim_methods=[[text] * 9],
        claim_note=text,
        simulation_columns=[text] * 3,
        simulation_rows=[[text] * 3],
        simulation_note=text,
        examples=[example(text)],
        features=[feature(0, text, text), feature(1, text, None), feature(2, "plain", "months")],
        configs=[ConfigShown("train_sae", "abc", [(text, text)])],
        figures={"lens": FigureEntry(line, text, text)},
    )  # fmt: skip
