"""What the report shows, gathered from the published artifacts and made safe to show.

Every text that comes from a corpus, a model or a labeler passes `visible_text` here, so that
no control, bidirectional or zero-width character reaches the page. HTML escaping is left to the
template and to `script_json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import PHASES, Clusters, Labels
from rldecoder.dashboard.relations import Relations
from rldecoder.explain.claims import CheckedClaim, claim_sentence
from rldecoder.explain.explanation import Explanation, Prediction
from rldecoder.interp.predicate import Predicate
from rldecoder.interp.records import (
    Example,
    FeatureLabel,
    JudgedScores,
    OtherLabel,
    Review,
    Scores,
)
from rldecoder.interp.shown import shown
from rldecoder.visible_text import visible_text, visible_token

SHOWN_METRICS = 6
WALL_SUFFIXES = ("_per_second", "_seconds", "_bytes")


def pipeline(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """The phases with their stages: digest, verdict, wall time, headline metrics."""
    published = {artifact.stage: artifact for artifact in artifacts}
    return [
        {
            "title": phase.upper() if phase == "rl" else phase.capitalize(),
            "stages": [_stage(kind.stage, published.get(kind.stage)) for kind in kinds],
        }
        for phase, kinds in PHASES.items()
    ]


def _stage(name: str, artifact: Artifact | None) -> dict[str, Any]:
    if artifact is None:
        return {"name": name, "digest": None, "verdict": None, "wall": None, "metrics": []}
    metrics = [
        (key, format_value(value))
        for key, value in artifact.metrics.items()
        if value is not None and not key.endswith(WALL_SUFFIXES)
    ]
    return {
        "name": name,
        "digest": artifact.digest,
        "verdict": artifact.verdict,
        "wall": format_seconds(artifact.wall_seconds),
        "metrics": metrics[:SHOWN_METRICS],
    }


def caveats(artifacts: Sequence[Artifact]) -> list[str]:
    """All caveats of all artifacts, each once, in the order of the pipeline."""
    texts = (text for artifact in artifacts for text in artifact.caveats)
    return [visible_text(text, 600) for text in dict.fromkeys(texts)]


def features(
    labels: Labels, clusters: Clusters, *, max_features: int, contexts: int
) -> list[dict[str, Any]]:
    """The feature browser's data: the most important features with highlighted contexts.

    Args:
        clusters: of the same labels, for places in the review queue, clusters, absorption, flags.
        contexts: strongest contexts a feature, at most.
    """
    acts = {
        (row["latent"], row["seq_id"], row["pos"]): row["acts"]
        for row in labels.examples.to_pylist()
        if row["kind"] in ("top", "quantile")
    }
    ranks = clusters.load_queue(labels.labels).ranks()
    relations = Relations(clusters.clusters)
    ordered = sorted(labels.labels.features, key=lambda feature: feature.importance_rank)
    return [
        _feature(feature, acts, contexts)
        | {"queue": ranks[feature.latent]}
        | {"relations": relations.of(feature.latent)}
        for feature in ordered[:max_features]
    ]


def _feature(
    feature: FeatureLabel, acts: Mapping[tuple[int, int, int], list[float]], contexts: int
) -> dict[str, Any]:
    contexts_shown = [*feature.examples[:contexts], *(feature.contrasts if contexts else ())]
    said = shown(feature)
    return {
        "latent": feature.latent,
        "shown": visible_text(said.text, 300),
        "is_label": said.is_label,
        "kind": feature.kind,
        "tried": _tried(feature),
        "label": None if feature.label is None else visible_text(feature.label, 200),
        "failure": None if feature.failure is None else visible_text(feature.failure, 200),
        "predicate": _predicate(feature.predicate),
        "labeler": visible_text(feature.labeler, 60),
        "confidence": round(feature.confidence, 3),
        "confidence_low": round(feature.confidence_low, 3),
        "confidence_high": round(feature.confidence_high, 3),
        "high": feature.high_confidence,
        "importance": feature.importance,
        "rank": feature.importance_rank,
        "density": feature.density,
        "scores": _scores(feature.scores),
        "others": [_other(label) for label in feature.other_labels],
        "promoted": [visible_token(effect.token, 24) for effect in feature.promoted],
        "suppressed": [visible_token(effect.token, 24) for effect in feature.suppressed],
        "examples": [_context(feature.latent, example, acts) for example in contexts_shown],
        "reviews": [review_view(review) for review in feature.reviews],
    }


def _tried(feature: FeatureLabel) -> list[list[str]]:
    """Both labels of a latent with what came of them, one a line."""
    lines = []
    if feature.input is not None:
        words = feature.input.text or f"no input label: {feature.input.failure}"
        facts = [] if feature.input.text is None else [_passes(feature.input.accepted)]
        weak = feature.input.weak.f1
        if feature.input.text is not None and weak is not None:
            facts.append(f"F1 {weak:.2f} of all its firings, the weak ones too")
        lines.append([words, *facts])
    if feature.output is not None:
        words = feature.output.text or f"no output label: {feature.output.failure}"
        facts, scores = [], feature.output.scores
        if feature.output.text is not None:
            facts = [
                _passes(feature.output.accepted),
                f"AUROC {scores.auroc:.2f}",
                f"log p of the set falls by {scores.drop:.2f} nats without it, by "
                f"{scores.other_drop:.2f} without another of the same length",
                f"{scores.share:.0%} of what moves",
            ]
        lines.append([words, *facts])
    return [[visible_text(part, 300) for part in line] for line in lines]


def _passes(accepted: bool) -> str:
    return "passes on unseen text" if accepted else "does not pass on unseen text"


def _context(
    latent: int, example: Example, acts: Mapping[tuple[int, int, int], list[float]]
) -> dict[str, Any]:
    window = acts.get((latent, example.seq_id, example.pos))
    if window is None or len(window) != len(example.tokens):
        window = [0.0] * len(example.tokens)
        window[example.focus] = example.act
    strongest = max(max(window), 1e-9)
    return {
        "kind": example.kind,
        "tokens": [visible_text(token, 40) for token in example.tokens],
        "heat": [round(max(act, 0.0) / strongest, 2) for act in window],
        "act": round(example.act, 3),
        "focus": example.focus,
    }


def review_view(review: Review) -> dict[str, Any]:
    """A verdict made safe to show. Whether it was an audit is not said: who knows it may judge
    otherwise."""
    return {
        "reviewer": visible_text(review.reviewer, 60),
        "accept": review.accept,
        "label": None if review.label is None else visible_text(review.label, 200),
        "note": visible_text(review.note, 1000),
        "at": None if review.at is None else visible_text(review.at, 40),
    }


def _scores(scores: Scores | JudgedScores) -> dict[str, float | None]:
    """All scores of a record, in few digits: a report holds a thousand cards."""
    return {
        name: None if value is None else round(value, 3)
        for name, value in scores
        if name != "firings"
    }


def _other(label: OtherLabel) -> dict[str, Any]:
    """A label by another labeler, with what its judge says of it."""
    return {
        "labeler": visible_text(label.labeler, 60),
        "model": visible_text(label.model, 120),
        "label": None if label.label is None else visible_text(label.label, 200),
        "failure": None if label.failure is None else visible_text(label.failure, 200),
        "judge": visible_text(label.judge, 120),
        "trusted": label.judge_trusted,
        "scores": _scores(label.scores),
        "confidence": None
        if label.confidence is None
        else [round(value, 3) for _, value in label.confidence],
        "no_confidence": None
        if label.no_confidence is None
        else visible_text(label.no_confidence, 200),
    }


def _predicate(predicate: Predicate | None) -> str | None:
    return None if predicate is None else visible_text(predicate.model_dump_json(), 400)


def example_view(explanation: Explanation) -> dict[str, Any]:
    """One explanation with all its texts made visible."""
    prompt, sanity = explanation.prompt, explanation.sanity
    return {
        "prompt": visible_text(prompt[-700:], 720),
        "cut": len(prompt) > 700,
        "kl": explanation.kl,
        "frozen": _prediction(explanation.frozen),
        "decoder": _prediction(explanation.decoder),
        "agree": explanation.frozen.token_id == explanation.decoder.token_id,
        "method_a": visible_text(explanation.method_a, 2000),
        "method_b": visible_text(explanation.method_b, 2000),
        "claims": [_claim(checked) for checked in explanation.claims],
        "sanity": None if sanity is None else asdict(sanity),
    }


def _prediction(prediction: Prediction) -> dict[str, Any]:
    return {
        "token": visible_token(prediction.token),
        "p": prediction.probability,
        "then": [(visible_token(token), p) for token, p in prediction.top[1:]],
    }


def _claim(checked: CheckedClaim) -> dict[str, Any]:
    return {
        "sentence": visible_text(claim_sentence(checked.claim), 800),
        "verdict": checked.verdict,
        "css": checked.verdict.replace(" ", "-"),
        "effect": checked.effect,
        "frozen_effect": checked.frozen_effect,
        "frozen_noise": checked.frozen_noise,
        "noise": checked.claim.noise,
    }


def format_value(value: Any) -> str:
    """A metric in few characters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return visible_text(str(value), 40)


def format_seconds(seconds: float) -> str:
    """A wall time in few characters."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def config_rows(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Every stage's configuration, for the reproducibility section."""
    return [
        {"stage": artifact.stage, "digest": artifact.digest, "config": _flat(artifact.config)}
        for artifact in artifacts
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += _flat(item, f"{prefix}{key}.")
        elif (
            isinstance(item, Sequence)
            and not isinstance(item, str)
            and item
            and all(isinstance(part, Mapping) for part in item)
        ):
            for index, part in enumerate(item):
                rows += _flat(part, f"{prefix}{key}[{index}].")
        else:
            rows.append((f"{prefix}{key}", visible_text(str(item), 200)))
    return rows
