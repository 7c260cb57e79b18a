"""What labels in words come to: records for `feature_labels.json`, a summary for controls.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rldecoder.interp.control_gaps import control_gaps, mean_intervals
from rldecoder.interp.labelers import LabelDraft
from rldecoder.interp.llm.confidence import WordConfidences
from rldecoder.interp.llm.judge import JudgeScores
from rldecoder.interp.llm.labeler import LlmLabeler
from rldecoder.interp.records import JudgedScores, JudgeTrust, OtherLabel
from rldecoder.interp.scores import mean_or_none

WORD_SCORES = ("detection", "fuzzing", "window_f1", "intruder", "simulation")
"""Scores of labels in words whose gaps to the controls are reported."""
SUMMARISED = (*WORD_SCORES, "window_precision", "window_recall")


class Judged(NamedTuple):
    """Labels in words of some latents, and what their judge says of them, row by row."""

    drafts: list[LabelDraft]
    scores: list[JudgeScores]


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
            scores=JudgedScores(**scores._asdict()),
            confidence=confidence,
            no_confidence=reason,
        )
        for draft, scores, confidence, reason in zip(
            *found.own,
            found.confidences.found,
            found.confidences.reasons,
            strict=True,
        )
    }


def llm_summary(found: LlmLabels) -> dict[str, Any]:
    """Counts and means, over all latents (a failure scores 0) and over those with a label.

    `controls` has the same of latents drawn from a random SAE and from the trained one, `gaps` how
    far labels lie above their controls (`control_gaps`).
    """
    live = [i for i, cached in enumerate(found.ledger["cached"]) if not cached]
    out: dict[str, Any] = {
        "labeler": found.models[0],
        "judge": found.trust.model_dump(mode="json"),
        "shuffled_latents": len(found.shuffled.scores),
        "confidence": found.confidences.report,
        "attempts": len(live),
        "cached_answers": len(found.ledger["cached"]) - len(live),
        **_means(found.own),
    }
    for name in ("tokens_in", "tokens_out", "cost"):
        out[name] = sum(found.ledger[name][i] for i in live)
    for name in SUMMARISED:
        out[f"mean_{name}_shuffled"] = _mean(found.shuffled.scores, name)
    out["controls"] = {name: _means(judged) for name, judged in found.drawn.items()}
    methods = {"label": found.own, "shuffled": found.shuffled, **found.drawn}
    out["gaps"] = control_gaps(methods, WORD_SCORES)
    return out


def _means(judged: Judged) -> dict[str, Any]:
    good = [s for d, s in zip(*judged, strict=True) if d.text is not None]
    out: dict[str, Any] = {
        "latents": len(judged.drafts),
        "labelled": len(good),
        "failed": len(judged.drafts) - len(good),
        "judge_questions": sum(s.questions for s in judged.scores),
        "judge_failures": sum(s.failures for s in judged.scores),
    }
    for name in SUMMARISED:
        out[f"mean_{name}"] = _mean(judged.scores, name)
        out[f"mean_{name}_labelled"] = _mean(good, name)
    return out | mean_intervals(judged, WORD_SCORES)


def _mean(scores: Sequence[JudgeScores], name: str) -> float | None:
    return mean_or_none([getattr(s, name) for s in scores])
