"""What the page may ask. Everything is bounded, and unknown fields are refused."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_PROMPT_CHARACTERS = 20_000
MAX_FACTOR = 10.0


class _Request(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class PromptRequest(_Request):
    """A text to read."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    """Its tokens are counted separately."""


class PositionRequest(PromptRequest):
    """One token of a text."""

    position: int = Field(ge=0, lt=1_000_000)
    """0 is the first token."""


class InterventionRequest(PositionRequest):
    """One feature at one token, scaled."""

    latent: int = Field(ge=0, lt=2**31)
    """Column of the dictionary."""
    factor: float = Field(ge=0, le=MAX_FACTOR)
    """What its activation is multiplied with: 0 takes it out."""


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
