"""Answers as the page reads them: plain values, every text made visible and short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rldecoder.dashboard.collect import example_view
from rldecoder.explain.explanation import Explanation
from rldecoder.explain.ranking import RankedFeature
from rldecoder.explain.reading import (
    Change,
    Choice,
    Feature,
    FeatureTable,
    Intervention,
    TokenTrace,
)
from rldecoder.interp.shown import UNKNOWN
from rldecoder.visible_text import visible_text, visible_token


def trace_view(trace: Sequence[TokenTrace]) -> dict[str, Any]:
    """The tokens of a prompt with both models' predictions."""
    return {
        "tokens": [
            {
                "token": visible_token(token.token),
                "frozen": _choices(token.frozen),
                "decoder": _choices(token.decoder),
                "agree": token.frozen[0].token_id == token.decoder[0].token_id,
                "kl": token.kl,
                "actual": token.actual,
                "features": [_feature(feature, feature.act) for feature in token.features],
                "active": token.num_active,
            }
            for token in trace
        ]
    }


def position_view(features: FeatureTable) -> dict[str, Any]:
    """All active features of a token."""
    return {
        "token": _choice(features.token),
        "features": [{**_feature(row, row.activation), "effect": row.effect} for row in features],
    }


def intervention_view(result: Intervention, latent: int) -> dict[str, Any]:
    """Both models before and after a change of one latent."""
    return {
        "latent": latent,
        "act": result.act,
        "new_act": result.new_act,
        "decoder": _change(result.decoder),
        "frozen": _change(result.frozen),
    }


def row_view(said: str, raised: Sequence[str], lowered: Sequence[str]) -> dict[str, Any]:
    """What is known of a latent without a card, and what it does to logits."""
    return {
        "shown": _text(said),
        "promoted": [visible_token(token, 24) for token in raised],
        "suppressed": [visible_token(token, 24) for token in lowered],
    }


def explanation_view(explanation: Explanation) -> dict[str, Any]:
    """Method A, the checked claims of Method B, and the sanity row."""
    return example_view(explanation)


def _change(change: Change) -> dict[str, Any]:
    return {
        "shifts": [
            {"token": visible_token(shift.token), "before": shift.before, "after": shift.after}
            for shift in change.shifts
        ],
        "effect": change.effect,
        "moved": change.moved,
    }


def _choices(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    return [_choice(choice) for choice in choices]


def _choice(choice: Choice) -> dict[str, Any]:
    return {"token": visible_token(choice.token), "p": choice.probability}


def _feature(feature: RankedFeature | Feature, act: float) -> dict[str, Any]:
    return {
        "latent": feature.latent,
        "act": act,
        "normalised": feature.normalised,
        "label": _text(feature.label),
        "unsure_label": _text(feature.unsure_label),
        "description": _text(feature.description or UNKNOWN.text),
        "quoted": feature.label is not None,
        "confidence": feature.confidence,
    }


def _text(label: str | None) -> str | None:
    return None if label is None else visible_text(label, 200)
