"""`controls.json`: labels beside their controls, and how far their confidence is to be believed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

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
from rldecoder.interp.kind_confidence import Picked
from rldecoder.interp.kinds import Accepted, Coverages, coverages
from rldecoder.interp.labelling import Confidences, Labelled
from rldecoder.interp.llm.results import LlmSummary
from rldecoder.interp.recalibration import PeopleReliability
from rldecoder.interp.scores import SUMMARISED
from rldecoder.schemas import JsonRecord, Scalar, optional


class MethodSummary(ScoreSummary):
    """Labels of some latents, or of a control."""

    accepted: int
    """Labels that pass on the `test` split."""


class CalibrationReport(JsonRecord):
    """How confidences made on the `label` split hold on the `test` split: of each latent the label,
    of its input or its output, with the larger confidence."""

    model: str
    """Of input labels: `logistic`, or `base_rate` where nothing could be fitted."""
    output_model: str = "none"
    """The same of output labels."""
    fit_rows: int
    """Labels of both kinds and rotations that confidence was fitted on."""
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
    coverage: Coverages | None = None
    """Latents with a label of either kind that passes, labels and controls by one procedure; None
    in files of older programs."""
    gaps: ControlGaps
    """Of the scores of input labels."""
    calibration: CalibrationReport
    acceptance: Acceptance
    llm: LlmSummary | None = optional()
    """Labels in words; absent where there are none."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        label, point = self.methods["label"], self.calibration.at_point_estimate
        coverage = self.coverage
        out: dict[str, Scalar] = {
            "accepted_on_test": label.accepted,
            **({} if coverage is None else coverage.headline),
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
    passed: Mapping[str, Accepted],
    picked: Picked,
    models: tuple[Confidences, Confidences],
    acceptance: Acceptance,
    people: PeopleReliability | None,
    llm: LlmSummary | None,
) -> LabelControls:
    """Summarise labels and controls.

    Args:
        methods: input labels by name, see `LabelControls.methods`.
        passed: which labels of both kinds pass, by the same names.
        picked: the confidences of `label`.
        models: of its input labels and of its output labels.
        people: see `recalibration`.
    """
    outcome = np.where(picked.output, passed["label"].outputs, passed["label"].inputs)
    has_label = picked.p > 0
    data = [confidences.model.data for confidences in models]
    # That of the labeler's own confidences: people's verdicts have their own in `people`.
    tau = high_confidence_threshold(picked.levels)

    return LabelControls(
        methods={
            name: MethodSummary.of(
                method, SUMMARISED, GAP_SCORES, accepted=int(passed[name].either.sum())
            )
            for name, method in methods.items()
        },
        coverage=coverages(passed),
        gaps=control_gaps(methods),
        calibration=CalibrationReport(
            model=models[0].model.kind,
            output_model=models[1].model.kind,
            fit_rows=sum(rows.accepted.size for rows in data),
            fit_accepted=int(sum(rows.accepted.sum() for rows in data)),
            high_confidence_threshold=tau,
            precision_bar=PRECISION_BAR,
            best_lower_bound=max(picked.levels, key=lambda entry: entry.low, default=None),
            high_confidence=coverage(picked.p, outcome, tau),
            at_point_estimate=coverage(picked.p, outcome, point_threshold(picked.levels)),
            best_possible_coverage=float(outcome.mean()),
            test=reliability(picked.p[has_label], outcome[has_label]),
            fit_out_of_fold=picked.fitted,
            people=people,
        ),
        acceptance=acceptance,
        llm=llm,
    )
