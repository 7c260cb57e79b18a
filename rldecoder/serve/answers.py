"""Answers as the page reads them: records of plain values, every text made visible and short."""

from __future__ import annotations

from typing import Annotated

from rldecoder.dashboard.cards import Context, FeatureCard, ReviewShown
from rldecoder.dashboard.relations import Related
from rldecoder.dashboard.shown import (
    ChoiceShown,
    Described,
    ExampleShown,
    Label,
    MeasuredShown,
    ShortToken,
    Shown,
    Token,
    TokenShown,
    up_to,
)
from rldecoder.interp.records import Kind

Program = str
"""Python that gives the same numbers; it is ASCII (`serve.code`)."""
Words = Annotated[str, up_to(600)]
Text = Annotated[str, up_to(20_000)]


class NumberedChoice(ChoiceShown):
    """What a model may say next; its number makes it a target."""

    token_id: int


class TracedToken(TokenShown):
    """One position of a prompt."""

    frozen: tuple[NumberedChoice, ...]
    decoder: tuple[NumberedChoice, ...]
    sink: bool
    """An attention sink: left out of the colours."""


class TraceAnswer(Shown):
    """The tokens of a prompt with both models' predictions."""

    tokens: tuple[TracedToken, ...]


class PositionAnswer(Shown):
    """All active features of a token."""

    token: NumberedChoice
    """What the effects are about: the decoder's first choice, or what was asked for."""
    minus: NumberedChoice | None
    """Whose log p is taken off."""
    features: tuple[MeasuredShown, ...]
    code: Program


class ShiftShown(Shown):
    """A token's probability before and after a change, or in two prompts."""

    token: Token
    token_id: int
    before: float
    after: float


class ChangeShown(Shown):
    """What a change does to one model: see `Change`."""

    shifts: tuple[ShiftShown, ...]
    effect: float
    moved: tuple[float, ...]
    target: tuple[float, float]


class InterventionAnswer(Shown):
    """Both models before and after features were changed."""

    at: int
    first: int
    act: float
    new_act: float
    about: Words
    """What the target is, in words."""
    decoder: ChangeShown
    frozen: ChangeShown
    code: Program


class ExplainAnswer(ExampleShown):
    """An explanation."""

    code: Program


class WrittenLine(Shown):
    """A piece of an answer in lines: what one model has written so far."""

    model: str
    changed: bool
    text: Text
    step: int
    """Tokens that all models have written together."""


class SteerAnswer(Shown):
    """The last line: everything that was written."""

    texts: tuple[WrittenLine, ...]
    code: Program


class DifferenceShown(Shown):
    """A feature in two prompts: see `FeatureDifference`."""

    latent: int
    act: float
    other_act: float
    difference: float
    label: Label | None
    unsure_label: Label | None
    description: Described
    confidence: float | None


class PredictionsShown(Shown):
    """One model in two prompts."""

    shifts: tuple[ShiftShown, ...]
    kl: float


class CompareAnswer(Shown):
    """Two prompts, each with its tokens, and what differs at one token of each."""

    tokens: tuple[Token, ...]
    other_tokens: tuple[Token, ...]
    at: tuple[int, int]
    features: tuple[DifferenceShown, ...]
    frozen: PredictionsShown
    decoder: PredictionsShown
    code: Program


class FeaturePage(Shown):
    """All that is known of a latent, for people."""

    latent: int
    shown: Annotated[str, up_to(300)]
    """Its label, or a description that says it is none."""
    is_label: bool
    sure: bool
    """Whether the label may be quoted."""
    usual: float
    """Its usual high (p99 on the label split), in the SAE's units; 0 where it never fired."""
    kind: Kind
    kind_words: Words
    worth: tuple[Words, ...]
    """How far to trust the label."""
    tried: tuple[tuple[Annotated[str, up_to(300)], ...], ...]
    """Both labels with what came of them."""
    numbers: tuple[tuple[Words, Words], ...]
    promoted: tuple[ShortToken, ...]
    """By the decoder's row."""
    suppressed: tuple[ShortToken, ...]
    raised: tuple[ShortToken, ...]
    """In the frozen model, by ablation; empty where that was not measured."""
    lowered: tuple[ShortToken, ...]
    examples: tuple[Context, ...]
    """What its label was made from."""
    relations: Related
    reviews: tuple[ReviewShown, ...]
    code: Program


class ContextsAnswer(Shown):
    """Where a latent fires in text that no label has seen."""

    split: str
    firings: int
    tokens: int
    contexts: tuple[Context, ...]


class FoundLatent(Shown):
    """A latent that was searched for."""

    latent: int
    shown: Label
    is_label: bool
    sure: bool
    usual: float
    """Its usual high, in the SAE's units; 0 where it never fired."""


class FindAnswer(Shown):
    """Latents that hold all words, labelled ones first."""

    found: tuple[FoundLatent, ...]
    more: int
    """Further ones."""


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
