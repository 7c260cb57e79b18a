"""Answers as the page reads them: records of plain values, every text made visible and short."""

from __future__ import annotations

from rldecoder.dashboard.cards import FeatureCard
from rldecoder.dashboard.shown import (
    ChoiceShown,
    Label,
    MeasuredShown,
    ShortToken,
    Shown,
    Token,
    TokenShown,
)
from rldecoder.explain.read_records import FeatureTable, Intervention
from rldecoder.schemas import optional


class TraceAnswer(Shown):
    """The tokens of a prompt with both models' predictions."""

    tokens: tuple[TokenShown, ...]


class PositionAnswer(Shown):
    """All active features of a token."""

    token: ChoiceShown
    """The decoder's first choice, which the effects are about."""
    features: tuple[MeasuredShown, ...]

    @classmethod
    def of(cls, features: FeatureTable) -> PositionAnswer:
        """What is said of a table."""
        return cls.model_validate({"token": features.token, "features": list(features)})


class ShiftShown(Shown):
    """A token's probability before and after a change."""

    token: Token
    before: float
    after: float


class ChangeShown(Shown):
    """What a change does to one model: see `Change`."""

    shifts: tuple[ShiftShown, ...]
    effect: float
    moved: tuple[float, ...]


class InterventionAnswer(Shown):
    """Both models before and after a change of one latent."""

    latent: int
    act: float
    new_act: float
    decoder: ChangeShown
    frozen: ChangeShown

    @classmethod
    def of(cls, result: Intervention, latent: int) -> InterventionAnswer:
        """What is said of an intervention."""
        return cls.model_validate(
            {
                "latent": latent,
                "act": result.act,
                "new_act": result.new_act,
                "decoder": result.decoder,
                "frozen": result.frozen,
            }
        )


class FeatureAnswer(Shown):
    """A latent's card; of one without, what is known of it and what it does to logits."""

    card: FeatureCard | None = None
    shown: Label | None = optional()
    promoted: tuple[ShortToken, ...] | None = optional()
    suppressed: tuple[ShortToken, ...] | None = optional()


class SearchAnswer(Shown):
    """One page of the cards that were searched for."""

    cards: tuple[FeatureCard, ...]
    found: int
    """On all pages."""
    all: int
    """Cards that there are."""


class QueueAnswer(Shown):
    """The next labels to look at."""

    cards: tuple[FeatureCard, ...]
    reviewed: int
    """Labels that are settled."""
    all: int
