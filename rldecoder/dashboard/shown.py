"""Records of what pages show; every text in them is made visible and short when it is taken in.

Texts come from corpora, models, labelers and people. `visible_text` leaves no control,
bidirectional or zero-width character; HTML escaping is left to the templates and `script_json`.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from rldecoder.explain.claims import CheckedClaim, Verdict, claim_sentence, measured_text
from rldecoder.explain.explanation import Explanation
from rldecoder.explain.ranking import ranking_rows
from rldecoder.interp.shown import UNKNOWN
from rldecoder.visible_text import visible_text, visible_token

PROMPT_SHOWN = 700
"""Characters at the end of a prompt."""


def up_to(limit: int) -> AfterValidator:
    """Makes a text visible, `limit` characters of it."""
    return AfterValidator(partial(visible_text, limit=limit))


Name = Annotated[str, up_to(60)]
Model = Annotated[str, up_to(120)]
Label = Annotated[str, up_to(200)]
"""A label, or why there is none."""
Described = Annotated[Label, BeforeValidator(lambda text: text or UNKNOWN.text)]
Token = Annotated[str, AfterValidator(visible_token)]
ShortToken = Annotated[str, AfterValidator(partial(visible_token, limit=24))]
Rounded = Annotated[float, AfterValidator(partial(round, ndigits=3))]
"""In few digits: a report holds a thousand cards."""


class Shown(BaseModel):
    """A record for pages; `model_validate` takes the object that it shows."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", from_attributes=True, use_attribute_docstrings=True
    )


class ChoiceShown(Shown):
    """What a model may say next."""

    token: Token
    p: float = Field(validation_alias="probability")


class FeatureShown(Shown):
    """An active feature."""

    latent: int
    act: float = Field(validation_alias=AliasChoices("act", "activation"))
    normalised: float
    label: Label | None
    unsure_label: Label | None
    description: Described
    """What is known of it without a label that may be quoted."""
    quoted: bool
    confidence: float | None


class MeasuredShown(FeatureShown):
    """An active feature, and what the prediction loses without it."""

    effect: float


class TokenShown(Shown):
    """One position of a prompt: see `TokenTrace`."""

    token: Token
    frozen: tuple[ChoiceShown, ...]
    decoder: tuple[ChoiceShown, ...]
    agree: bool
    kl: float
    actual: tuple[float, float] | None
    features: tuple[FeatureShown, ...]
    active: int = Field(validation_alias="num_active")


class PredictionShown(ChoiceShown):
    """What a model says next, and would say else."""

    then: Annotated[tuple[tuple[Token, float], ...], AfterValidator(lambda top: top[1:])] = Field(
        validation_alias="top"
    )
    """The next most likely ones."""


class ClaimShown(Shown):
    """A claim in words, with what interventions say of it."""

    sentence: Annotated[str, up_to(800)]
    verdict: Verdict
    css: str
    """The verdict as the name of a style."""
    measured: Annotated[str, up_to(200)]
    """What the frozen model and the decoder do when the feature is taken out, in words."""
    change: float
    """Of the frozen model's log p when the feature is taken out, nats."""
    noise: float
    """What chance explains of it."""
    decoder_change: float
    """The same, of the decoder."""

    @classmethod
    def of(cls, checked: CheckedClaim) -> ClaimShown:
        """What is shown of a checked claim."""
        return cls(
            sentence=claim_sentence(checked.claim),
            verdict=checked.verdict,
            css=checked.verdict.replace(" ", "-"),
            measured=measured_text(checked),
            change=-checked.effect,
            noise=checked.claim.noise,
            decoder_change=-checked.decoder_effect,
        )


class ExampleShown(Shown):
    """One explanation: both predictions, Method A's table, the claims of Method B."""

    prompt: Annotated[str, up_to(PROMPT_SHOWN)]
    """Its end."""
    cut: bool
    """Whether the prompt is longer."""
    kl: float
    frozen: PredictionShown
    decoder: PredictionShown
    agree: bool
    """Whether both say the same."""
    active: tuple[tuple[Label, Label, Label], ...]
    """Method A: feature, share of its usual high, what it is."""
    tested: Annotated[str, up_to(600)]
    """What was tested, in a sentence."""
    says: Annotated[str, up_to(600)]
    """Method B in sentences."""
    claims: tuple[ClaimShown, ...]
    """Those to read first."""
    more_claims: tuple[ClaimShown, ...]
    """The others."""

    @classmethod
    def of(cls, explanation: Explanation) -> ExampleShown:
        """What is shown of an explanation."""
        frozen, decoder = explanation.frozen, explanation.decoder
        return cls(
            prompt=explanation.prompt[-PROMPT_SHOWN:],
            cut=len(explanation.prompt) > PROMPT_SHOWN,
            kl=explanation.kl,
            frozen=PredictionShown.model_validate(frozen),
            decoder=PredictionShown.model_validate(decoder),
            agree=frozen.token_id == decoder.token_id,
            active=tuple(ranking_rows(explanation.ranked)),
            tested=explanation.tested,
            says=explanation.says,
            claims=tuple(map(ClaimShown.of, explanation.reasons)),
            more_claims=tuple(
                ClaimShown.of(checked)
                for checked in explanation.claims
                if checked not in explanation.reasons
            ),
        )
