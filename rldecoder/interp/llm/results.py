"""What labels in words come to: records for `feature_labels.json`, a summary for controls.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rldecoder.interp.control_gaps import ControlGaps, ScoreSummary, control_gaps
from rldecoder.interp.labelers import LabelDraft
from rldecoder.interp.llm.confidence import WordCalibration, WordConfidences
from rldecoder.interp.llm.labeler import LlmLabeler
from rldecoder.interp.llm.others import JudgedOthers
from rldecoder.interp.records import JudgedScores, JudgeTrust, OtherLabel
from rldecoder.interp.scores import means
from rldecoder.schemas import Scalar

WORD_SCORES = ("detection", "fuzzing", "window_f1", "intruder", "simulation")
"""Scores of labels in words whose gaps to the controls are reported."""
SUMMARISED = tuple(
    name for name, field in JudgedScores.model_fields.items() if field.annotation == float | None
)


class JudgedSummary(ScoreSummary):
    """Labels in words of some latents, as their judge sees them."""

    judge_questions: int
    judge_failures: int
    """Questions without a usable answer; they count as wrong."""


class LlmSummary(JudgedSummary):
    """Labels in words of the run's most important latents, their controls, and what they cost."""

    labeler: str
    """The model that wrote them."""
    judge: JudgeTrust
    shuffled_latents: int
    """Latents that were also judged by another one's label."""
    means_shuffled: dict[str, float | None]
    """By score, of these with the other label."""
    confidence: WordCalibration
    attempts: int
    """Requests that were sent."""
    cached_answers: int
    """Answers that were there already."""
    tokens_in: int
    """Of all requests sent."""
    tokens_out: int
    cost: float
    """US dollars."""
    controls: dict[str, JudgedSummary]
    """Latents drawn from a random SAE and from the trained one; empty if that was not asked for."""
    gaps: ControlGaps

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        out: dict[str, Scalar] = {
            "llm_labelled": self.labelled,
            "llm_judge_trusted": self.judge.trusted,
            "llm_shuffled_detection": self.means_shuffled["detection"],
            "llm_confidence_ece": self.confidence.ece,
            "llm_confidence_brier": self.confidence.brier,
            "llm_cost": self.cost,
        }
        for name in ("detection", "fuzzing", "intruder", "simulation"):
            out[f"llm_mean_{name}"] = self.means[name]
        for name, control in self.controls.items():
            out[f"llm_{name}_detection"] = control.means["detection"]
        if self.controls:
            out |= self.gaps.numbers("llm_gap", ("detection", "fuzzing"))
        return out

    @property
    def reasons(self) -> tuple[str, ...]:
        """What a reader of these labels must know."""
        out: tuple[str, ...] = ()
        if self.confidence.reason is not None:
            out += (f"Labels in words have no confidence: {self.confidence.reason}.",)
        if not self.judge.trusted:
            out += (
                f"The judge {self.judge.model} of the labels in words is not trusted: "
                f"{self.judge.reason}. Its scores must not be believed.",
            )
        return out


class Judged(NamedTuple):
    """Labels in words of some latents, and what their judge says of them, row by row."""

    drafts: list[LabelDraft]
    scores: list[JudgedScores]


class LlmLabels(NamedTuple):
    """What the language model said, and what its judge thinks of it."""

    own: Judged
    """The run's most important latents."""
    trust: JudgeTrust
    shuffled: Judged
    """The first of them that have a label, each with another one's."""
    drawn: Mapping[str, Judged]
    """By control, `random_sae` and `drawn`; empty if that was not asked for."""
    models: tuple[str, str]
    """Names of the labeler's and of the judge's model."""
    ledger: dict[str, list[Any]]
    """Columns of storage.LEDGER."""
    confidences: WordConfidences
    others: JudgedOthers | None = None
    """Of labels of others in words, where there are any."""


def as_records(found: LlmLabels) -> dict[int, OtherLabel]:
    """What `feature_labels.json` says of each latent."""
    return {
        draft.latent: OtherLabel(
            labeler=LlmLabeler.name,
            model=found.models[0],
            label=draft.text,
            failure=draft.failure,
            judge=found.models[1],
            judge_trusted=found.trust.trusted,
            scores=scores,
            confidence=confidence,
            no_confidence=reason,
        )
        for draft, scores, confidence, reason in zip(
            *found.own, found.confidences.found, found.confidences.reasons, strict=True
        )
    }


def llm_summary(found: LlmLabels) -> LlmSummary:
    """Counts, means and costs; the ledger's rows of this artifact's requests are summed up."""
    ledger = found.ledger
    live = [i for i, cached in enumerate(ledger["cached"]) if not cached]
    methods = {"label": found.own, "shuffled": found.shuffled, **found.drawn}
    return LlmSummary.of(
        found.own,
        SUMMARISED,
        WORD_SCORES,
        **_answers(found.own),
        labeler=found.models[0],
        judge=found.trust,
        shuffled_latents=len(found.shuffled.scores),
        means_shuffled=means(found.shuffled.scores, SUMMARISED),
        confidence=found.confidences.report,
        attempts=len(live),
        cached_answers=len(ledger["cached"]) - len(live),
        tokens_in=sum(ledger["tokens_in"][i] for i in live),
        tokens_out=sum(ledger["tokens_out"][i] for i in live),
        cost=sum(ledger["cost"][i] for i in live),
        controls={
            name: JudgedSummary.of(judged, SUMMARISED, WORD_SCORES, **_answers(judged))
            for name, judged in found.drawn.items()
        },
        gaps=control_gaps(methods, WORD_SCORES),
    )


def _answers(judged: Judged) -> dict[str, int]:
    return {
        "judge_questions": sum(scores.questions for scores in judged.scores),
        "judge_failures": sum(scores.failures for scores in judged.scores),
    }
