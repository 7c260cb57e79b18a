"""Claims of Method B: what they say, in which words, and whether interventions agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rldecoder.visible_text import visible_text, visible_token

Direction = Literal["supports", "opposes"]
Verdict = Literal["supported", "contradicted", "too small to tell"]

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Claim:
    """One checkable statement about one prediction of the frozen model."""

    latent: int
    label: str | None
    """None where there is none, or none that may be quoted."""
    evidence_position: int
    """Token position where the feature is most active in the text so far."""
    evidence_text: str
    direction: Direction
    strength: float
    """Predicted |effect| of removing the feature on log p(output token), nats."""
    noise: float
    """Effects up to this many nats are what a random direction of the same length does, or too
    small to be of use."""
    output_token: str
    probability: float
    """The frozen model's probability of the output token."""
    sure: float
    """Predicted probability that the intervention bears the claim out."""
    label_confidence: float | None = None
    """Of the latent's label, quoted or not."""
    description: str | None = None
    """What is known of a latent without a label that may be quoted."""


@dataclass(frozen=True)
class CheckedClaim:
    """A claim with the outcome of its intervention."""

    claim: Claim
    effect: float
    """Measured in the frozen model: log p(token) - log p(token without the feature), nats."""
    verdict: Verdict
    decoder_effect: float
    """What the same removal does to the decoder's log p of the same token, nats. It has no part in
    the verdict: the decoder only reads the frozen model."""


def claim_sentence(claim: Claim) -> str:
    """The claim in words, always by the same grammar."""
    what = ""
    if claim.label is not None:
        what = f" “{visible_text(claim.label, 120)}”"
    elif claim.description is not None:
        what = f" ({visible_text(claim.description, 160)})"

    # Nats are for tables: people compare probabilities.
    supports = claim.direction == "supports"
    effect = claim.strength if supports else -claim.strength
    without = min(1.0, claim.probability * math.exp(-effect))
    return (
        f"Feature #{claim.latent}{what} is strongest at “{visible_token(claim.evidence_text)}” "
        f"(token {claim.evidence_position}) and speaks {'for' if supports else 'against'} "
        f"“{visible_token(claim.output_token)}”. Without it, the probability would "
        f"{'fall' if supports else 'rise'} from {percent(claim.probability)} to {percent(without)} "
        f"({100 * claim.sure:.0f} % sure)."
    )


def prediction_text(token: str, probability: float, claims: Sequence[Claim]) -> str:
    """What is expected, and how many reasons there are; says so when there is nothing to claim.

    Args:
        token: the frozen model's most likely next token, raw.
    """
    start = f"The model expects “{visible_token(token)}” ({percent(probability)})."
    if not claims:
        return (
            f"{start} Method B names no reason: it expects no single feature to move this "
            "prediction clearly more than a random direction would."
        )
    speaks = sum(claim.direction == "supports" for claim in claims)
    sides = [
        f"{_number(count)} feature{'' if count == 1 else 's'} speak{'s' if count == 1 else ''} "
        f"{side} it"
        for count, side in ((speaks, "for"), (len(claims) - speaks, "against"))
        if count
    ]
    sentence = ", ".join(sides)
    return f"{start} {sentence[0].upper()}{sentence[1:]}."


def measured_text(checked: CheckedClaim) -> str:
    """What the interventions measured, in probabilities and in nats of log p."""
    claim = checked.claim
    without = min(1.0, claim.probability * math.exp(-checked.effect))
    claimed = -claim.strength if claim.direction == "supports" else claim.strength
    return (
        f"{percent(without)} measured, {-checked.effect:+.2f} nats ({claimed:+.2f} claimed, chance "
        f"{claim.noise:.2f}); decoder {-checked.decoder_effect:+.2f}"
    )


def percent(probability: float) -> str:
    """A probability for readers: whole percents, with a tenth below ten.

    >>> percent(0.167), percent(0.034), percent(0.0001)
    ('17 %', '3.4 %', 'under 0.1 %')
    """
    if probability < 0.0005:
        return "under 0.1 %"
    return f"{100 * probability:.{1 if probability < 0.0995 else 0}f} %"


def explanation_text(token: str, probability: float, claims: Sequence[Claim]) -> str:
    """The prediction and all its reasons, numbered; arguments as for `prediction_text`."""
    sentences = [f"({place}) {claim_sentence(claim)}" for place, claim in enumerate(claims, 1)]
    return " ".join([prediction_text(token, probability, claims), *sentences])


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def judge(predicted_sign: float, effect: float, noise: float) -> Verdict:
    """Compare a predicted direction with the frozen model's effect.

    Args:
        predicted_sign: > 0 for supports, < 0 for opposes.
        effect: measured in the frozen model, nats.
        noise: effects up to this size are not told from chance (`patching.noise_floor`).
    """
    sign = 1 if predicted_sign > 0 else -1
    if effect * sign > noise:
        return "supported"
    return "contradicted" if effect * sign < -noise else "too small to tell"
