"""`controls.json`: labels beside their controls, and how far their confidence is to be believed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from rldecoder.interp.calibration import (
    PRECISION_BAR,
    Acceptance,
    Coverage,
    Reliability,
    Threshold,
    coverage,
    high_confidence_threshold,
    point_threshold,
    reliability,
)
from rldecoder.interp.control_gaps import GAP_SCORES, ControlGaps, ScoreSummary, control_gaps
from rldecoder.interp.labelling import Confidences, Labelled
from rldecoder.interp.llm.results import LlmSummary
from rldecoder.interp.recalibration import PeopleReliability
from rldecoder.interp.scores import SUMMARISED
from rldecoder.schemas import JsonRecord, Scalar


class MethodSummary(ScoreSummary):
    """Labels of some latents, or of a control."""

    accepted: int
    """Labels that pass on the `test` split."""


class CalibrationReport(JsonRecord):
    """How confidences made on the `label` split hold on the `test` split."""

    model: str
    """`logistic`, or `base_rate` where nothing could be fitted."""
    fit_rows: int
    """Labels and rotations that confidence was fitted on."""
    fit_accepted: int
    high_confidence_threshold: float | None
    """Smallest confidence of a high-confidence label, before people's verdicts; None: none is
    safe."""
    precision_bar: float
    """What the lower bound of the accepted share must reach there."""
    best_lower_bound: Threshold | None
    """How far the evidence goes: without a threshold, why there is none."""
    high_confidence: Coverage
    """At that threshold."""
    at_point_estimate: Coverage
    """At the smallest one whose accepted share itself reaches the bar."""
    best_possible_coverage: float
    """Labels that pass on `test`, over all latents."""
    test: Reliability
    fit_out_of_fold: Reliability
    people: PeopleReliability | None
    """How confidences hold against people; None with too few verdicts."""


class LabelControls(JsonRecord):
    """What to hold the labels' scores against."""

    methods: dict[str, MethodSummary]
    """`label`: the labels themselves; `shuffled`: each with another latent's label; `random_sae`
    and `drawn`: latents drawn alike from an untrained SAE and from the trained one."""
    gaps: ControlGaps
    calibration: CalibrationReport
    acceptance: Acceptance
    llm: LlmSummary | None = Field(None, exclude_if=lambda found: found is None)
    """Labels in words; absent where there are none."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        label, point = self.methods["label"], self.calibration.at_point_estimate
        out: dict[str, Scalar] = {
            "accepted_on_test": label.accepted,
            "point_coverage": point.coverage.value,
            "point_precision": point.precision.value,
            "point_precision_low": point.precision.low,
            "point_precision_high": point.precision.high,
            "shuffled_detection": self.methods["shuffled"].means["detection"],
            "confidence_ece": self.calibration.test.ece,
            "confidence_brier": self.calibration.test.brier,
            **self.gaps.numbers("gap", GAP_SCORES),
        }
        for name in ("detection", "detection_hard", "fuzzing", "intruder", "simulation", "f1"):
            out[f"mean_{name}"] = label.means[name]
        for method in ("random_sae", "drawn"):
            for name in GAP_SCORES:
                out[f"{method}_{name}"] = self.methods[method].means[name]
        people = self.calibration.people
        if people is not None:
            out |= {"people_n": people.n, "people_ece": people.ece, "people_brier": people.brier}
        return out if self.llm is None else out | self.llm.headline


def label_controls(
    methods: Mapping[str, Labelled],
    confidences: Confidences,
    acceptance: Acceptance,
    levels: list[Threshold],
    people: PeopleReliability | None,
    llm: LlmSummary | None,
) -> LabelControls:
    """Summarise labels and controls.

    Args:
        methods: by name, see `LabelControls.methods`.
        confidences: of `label`.
        levels: what each confidence is worth on the rows that it was fitted on.
        people: see `recalibration`.
    """
    labelled = methods["label"]
    outcomes = {name: _accepted(method, acceptance) for name, method in methods.items()}
    has_label = np.array([draft.text is not None for draft in labelled.drafts], bool)
    outcome, model = outcomes["label"], confidences.model
    # That of the labeler's own confidences: people's verdicts have their own in `people`.
    tau = high_confidence_threshold(levels)

    return LabelControls(
        methods={
            name: MethodSummary.of(
                method, SUMMARISED, GAP_SCORES, accepted=int(outcomes[name].sum())
            )
            for name, method in methods.items()
        },
        gaps=control_gaps(methods),
        calibration=CalibrationReport(
            model=model.kind,
            fit_rows=model.data.accepted.size,
            fit_accepted=int(model.data.accepted.sum()),
            high_confidence_threshold=tau,
            precision_bar=PRECISION_BAR,
            best_lower_bound=max(levels, key=lambda entry: entry.low, default=None),
            high_confidence=coverage(confidences.p, outcome, tau),
            at_point_estimate=coverage(confidences.p, outcome, point_threshold(levels)),
            best_possible_coverage=float(outcome.mean()),
            test=reliability(confidences.p[has_label], outcome[has_label]),
            fit_out_of_fold=reliability(model.out_of_fold(), model.data.accepted),
            people=people,
        ),
        acceptance=acceptance,
        llm=llm,
    )


def _accepted(
    labelled: Labelled, acceptance: Acceptance
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """[K] whether a label passes; a failure does not."""
    return np.array(
        [
            draft.text is not None and acceptance.accepts(scores)
            for draft, scores in zip(*labelled, strict=True)
        ],
        bool,
    )
