"""What the page may ask. Everything is bounded, and unknown fields are refused."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_PROMPT_CHARACTERS = 20_000
MAX_FACTOR = 20.0
MAX_ACTIVATION = 1e6
MAX_CHANGES = 24
MAX_NEW_TOKENS = 200
MAX_TOKEN_CHARACTERS = 200


class _Request(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class PromptRequest(_Request):
    """A text to read."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    """Its tokens are counted separately."""


class TargetRequest(_Request):
    """What effects are about."""

    token: int = Field(ge=0, lt=2**31)
    """Its log p."""
    minus: int | None = Field(None, ge=0, lt=2**31)
    """Less that of another token."""


class PositionRequest(PromptRequest):
    """One token of a text."""

    position: int = Field(ge=0, lt=1_000_000)
    """0 is the first token."""
    target: TargetRequest | None = None
    """None: log p of the likeliest token."""


class ChangeRequest(_Request):
    """What becomes of one feature's activation."""

    latent: int = Field(ge=0, lt=2**31)
    """Column of the dictionary."""
    how: Literal["scale", "set", "clamp"]
    value: float = Field(ge=-MAX_ACTIVATION, le=MAX_ACTIVATION)
    """The factor; the activation; the least activation."""
    high: float | None = Field(None, ge=0, le=MAX_ACTIVATION)
    """The greatest activation of a clamp; None: there is none."""

    @model_validator(mode="after")
    def _can_be_meant(self) -> Self:
        if self.how == "scale" and abs(self.value) > MAX_FACTOR:
            raise ValueError(f"a factor is a number from -{MAX_FACTOR:g} to {MAX_FACTOR:g}")
        if self.how != "clamp" and self.high is not None:
            raise ValueError("only a clamp has a greatest activation")
        return self


class ChangesRequest(PromptRequest):
    """A text, and features that are changed in it."""

    changes: tuple[ChangeRequest, ...] = Field((), max_length=MAX_CHANGES)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        latents = [change.latent for change in self.changes]
        twice = [latent for latent in latents if latents.count(latent) > 1]
        if twice:
            raise ValueError(f"feature {twice[0]} is named twice")
        return self


class InterventionRequest(ChangesRequest):
    """Features changed at one token, from one on, or at all; what both models then predict."""

    position: int = Field(ge=0, lt=1_000_000)
    """The token that is looked at; see `where`."""
    where: Literal["here", "from", "all"] = "here"
    """`here`: changed at `position`, and looked at there. `from`: changed from there on. `all`: at
    every token. Both look at the last prediction."""
    target: TargetRequest | None = None


class SteerRequest(ChangesRequest):
    """A text to write on, with changed features and without, by both models."""

    start: int = Field(1, ge=1, lt=1_000_000)
    """The first token that is changed."""
    new_tokens: int = Field(24, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(0.0, ge=0, le=5)
    """0: the likeliest token each time."""
    seed: int = Field(0, ge=0, lt=2**31)


class CompareRequest(PromptRequest):
    """Two texts."""

    other: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    position: int | None = Field(None, ge=0, lt=1_000_000)
    """Token of `prompt`; None: its last."""
    other_position: int | None = Field(None, ge=0, lt=1_000_000)
    """Of `other`."""


class TokenRequest(_Request):
    """A text that should be one token."""

    text: str = Field(min_length=1, max_length=MAX_TOKEN_CHARACTERS)


class FindQuery(_Request):
    """Latents to add: by words, or by number."""

    words: str = Field(max_length=200)
    count: int = Field(8, ge=1, le=24)
    others: bool = False
    """Of those found by words only the ones without a card."""


class FeatureQuery(_Request):
    """A page of the feature list."""

    words: str = Field("", max_length=200)
    """All must occur in a label, a token it raises, or a context; #12 is latent 12."""
    sort: Literal["importance", "confidence", "density", "latent", "review"] = "importance"
    only: Literal["all", "high", "low", "failed"] = "all"
    """`high`: labels of high confidence; `low`: other labels; `failed`: described only."""
    start: int = Field(0, ge=0, lt=2**31)
    count: int = Field(12, ge=1, le=48)


class ReviewRequest(_Request):
    """A person's verdict on a label."""

    latent: int = Field(ge=0, lt=2**31)
    reviewer: str = Field(min_length=1, max_length=60)
    """Who says so; kept with the verdict."""
    accept: bool | None = None
    """Whether the label is right."""
    label: str | None = Field(None, min_length=1, max_length=200)
    """A better one."""
    note: str = Field("", max_length=1000)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.reviewer.strip():
            raise ValueError("say who you are: the verdict is kept with your name")
        if self.accept is None and self.label is None:
            raise ValueError("give a verdict or a better label")
        if self.label is not None and not self.label.strip():
            raise ValueError("the better label is empty")
        return self
