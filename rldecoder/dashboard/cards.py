"""Cards of labelled features, for the report's browser and the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rldecoder.artifacts.catalogue import Clusters, Labels
from rldecoder.dashboard.relations import Related, Relations
from rldecoder.dashboard.shown import Label, Model, Name, Rounded, ShortToken, Shown, up_to
from rldecoder.interp.records import Example, FeatureLabel, Kind, LabelConfidence
from rldecoder.interp.shown import shown

CONTEXTS = 6
"""Strongest contexts on a card."""

Activations = Mapping[tuple[int, int, int], Sequence[float]]
"""Activations of a window, by latent, sequence and position."""


def _score_values(scores: Any) -> dict[str, float | None]:
    return {
        name: None if value is None else round(value, 3)
        for name, value in scores
        if name != "firings"
    }


ScoreValues = Annotated[dict[str, int | float | None], BeforeValidator(_score_values)]
"""All scores of a record, in few digits."""


def _ends(confidence: LabelConfidence | None) -> tuple[float, float, float] | None:
    return None if confidence is None else (confidence.p, confidence.low, confidence.high)


class ReviewShown(Shown):
    """A verdict. Whether it was an audit is not said: who knows it may judge otherwise."""

    reviewer: Name
    accept: bool | None
    label: Label | None
    note: Annotated[str, up_to(1000)]
    at: Annotated[str, up_to(40)] | None


class OtherLabelShown(Shown):
    """A label by another labeler, with what its judge says of it."""

    labeler: Name
    model: Model
    label: Label | None
    failure: Label | None
    judge: Model
    trusted: bool = Field(validation_alias="judge_trusted")
    scores: ScoreValues
    confidence: Annotated[tuple[Rounded, Rounded, Rounded] | None, BeforeValidator(_ends)]
    """p(accept) and the ends of its interval."""
    no_confidence: Label | None


class Context(Shown):
    """A window of text around an activation."""

    kind: str
    tokens: tuple[Annotated[str, up_to(40)], ...]
    heat: tuple[float, ...]
    """Activations as shares of the window's highest."""
    act: Rounded
    focus: int
    """The token that the window is about."""


class FeatureCard(Shown):
    """One of the most important latents."""

    latent: int
    shown: Annotated[str, up_to(300)]
    """What is said of it: its label, or a description that says it is none."""
    is_label: bool
    """Whether that is a label."""
    kind: Kind
    """Of which kind its label is."""
    tried: tuple[tuple[Annotated[str, up_to(300)], ...], ...]
    """Both labels with what came of them, one a row."""
    label: Label | None
    failure: Label | None
    predicate: Annotated[str, up_to(400)] | None
    labeler: Name
    confidence: Rounded
    confidence_low: Rounded
    confidence_high: Rounded
    high: bool
    """Whether the confidence is high."""
    importance: float
    rank: int
    """By importance, from 1."""
    density: float
    scores: ScoreValues
    others: tuple[OtherLabelShown, ...]
    """By other labelers."""
    promoted: tuple[ShortToken, ...]
    suppressed: tuple[ShortToken, ...]
    examples: tuple[Context, ...]
    reviews: tuple[ReviewShown, ...]
    queue: int
    """Place in the review queue."""
    relations: Related


def feature_cards(
    labels: Labels, clusters: Clusters, *, max_features: int, contexts: int = CONTEXTS
) -> list[FeatureCard]:
    """Cards of the most important features.

    Args:
        clusters: of the same labels, for places in the review queue, clusters, absorption, flags.
        contexts: a feature, at most.
    """
    acts: Activations = {
        (row["latent"], row["seq_id"], row["pos"]): row["acts"]
        for row in labels.examples.to_pylist()
        if row["kind"] in ("top", "quantile")
    }
    ranks = clusters.load_queue(labels.labels).ranks()
    relations = Relations(clusters.clusters)
    ordered = sorted(labels.labels.features, key=lambda feature: feature.importance_rank)
    return [
        _card(feature, acts, contexts, ranks[feature.latent], relations.of(feature.latent))
        for feature in ordered[:max_features]
    ]


def _card(
    feature: FeatureLabel, acts: Activations, contexts: int, queue: int, relations: Related
) -> FeatureCard:
    predicate = feature.predicate
    said = shown(feature)
    # Contrasts are texts that it is silent on, and tell nothing without an example beside them.
    examples = [*feature.examples[:contexts], *(feature.contrasts if contexts else ())]

    return FeatureCard(
        latent=feature.latent,
        shown=said.text,
        is_label=said.is_label,
        kind=feature.kind,
        tried=_tried(feature),
        label=feature.label,
        failure=feature.failure,
        predicate=None if predicate is None else predicate.model_dump_json(),
        labeler=feature.labeler,
        confidence=feature.confidence,
        confidence_low=feature.confidence_low,
        confidence_high=feature.confidence_high,
        high=feature.high_confidence,
        importance=feature.importance,
        rank=feature.importance_rank,
        density=feature.density,
        scores=feature.scores,
        others=feature.other_labels,
        promoted=[effect.token for effect in feature.promoted],
        suppressed=[effect.token for effect in feature.suppressed],
        examples=[_context(example, acts, feature.latent) for example in examples],
        reviews=feature.reviews,
        queue=queue,
        relations=relations,
    )


def _tried(feature: FeatureLabel) -> list[list[str]]:
    """Both labels of a latent with what came of them, one a row."""
    rows = []
    if feature.input is not None:
        words = feature.input.text or f"no input label: {feature.input.failure}"
        facts = [] if feature.input.text is None else [_passes(feature.input.accepted)]
        weak = feature.input.weak.f1
        if feature.input.text is not None and weak is not None:
            facts.append(f"F1 {weak:.2f} of all its firings, the weak ones too")
        rows.append([words, *facts])
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
        rows.append([words, *facts])
    return rows


def _passes(accepted: bool) -> str:
    return "passes on unseen text" if accepted else "does not pass on unseen text"


def _context(example: Example, acts: Activations, latent: int) -> Context:
    window = acts.get((latent, example.seq_id, example.pos))
    if window is None or len(window) != len(example.tokens):
        window = [0.0] * len(example.tokens)
        window[example.focus] = example.act
    strongest = max(*window, 1e-9)
    return Context(
        kind=example.kind,
        tokens=example.tokens,
        heat=[round(max(act, 0.0) / strongest, 2) for act in window],
        act=example.act,
        focus=example.focus,
    )
