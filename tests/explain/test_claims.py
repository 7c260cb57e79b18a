"""Verdicts follow from real interventions; wording follows from the claim."""

from __future__ import annotations

import pytest

from rldecoder.explain.claims import (
    CheckedClaim,
    Claim,
    claim_sentence,
    explanation_text,
    judge,
    measured_text,
)


def make_claim(**changes: object) -> Claim:
    values: dict[str, object] = {
        "latent": 12, "label": "months", "evidence_position": 3, "evidence_text": " May",
        "direction": "supports", "strength": 0.3, "noise": 0.1, "output_token": " 5",
        "probability": 0.4, "sure": 0.914,
    }  # fmt: skip
    return Claim(**{**values, **changes})  # type: ignore[arg-type]


def test_sentence() -> None:
    assert claim_sentence(make_claim()) == (
        "Feature #12 “months” is strongest at “␣May” (token 3) and speaks for “␣5”. "
        "Without it, the probability would fall from 40 % to 30 % (91 % sure)."
    )
    against = claim_sentence(make_claim(direction="opposes", strength=0.05, label=None))
    assert "#12 is strongest" in against
    assert "speaks against “␣5”" in against
    assert "would rise from 40 % to 42 %" in against
    unnamed = claim_sentence(make_claim(label=None, description="raises “a”\u202e"))
    assert unnamed.startswith("Feature #12 (raises “a”⟨U+202E⟩) is strongest")
    # No probability is above one.
    assert "to 100 %" in claim_sentence(make_claim(direction="opposes", strength=2.0))


def test_what_was_measured() -> None:
    checked = CheckedClaim(make_claim(), 0.7, "supported", -0.05)
    assert measured_text(checked) == (
        "20 % measured, -0.70 nats (-0.30 claimed, chance 0.10); decoder +0.05"
    )


def test_no_claims_say_so() -> None:
    # What the explainer expects, not what was measured: nobody removed every feature.
    assert explanation_text(" 5", 0.4, []) == (
        "The model expects “␣5” (40 %). Method B names no reason: it expects no single feature "
        "to move this prediction clearly more than a random direction would."
    )


def test_reasons_for_and_against_are_counted() -> None:
    both = [make_claim(), make_claim(), make_claim(direction="opposes")]
    text = explanation_text(" 5", 0.4, both)
    assert text.startswith(
        "The model expects “␣5” (40 %). Two features speak for it, one feature speaks against it."
    )
    assert text.count("Feature #12") == 3
    assert "(3) Feature" in text
    assert "against" not in explanation_text(" 5", 0.4, both[:1])


@pytest.mark.parametrize(
    ("sign", "effect", "verdict"),
    [
        (1, 0.5, "supported"),
        (-1, -0.5, "supported"),
        (1, -0.5, "contradicted"),
        (-1, 0.5, "contradicted"),
        (1, 0.1, "too small to tell"),
        (-1, 0.1, "too small to tell"),
        (1, -0.1, "too small to tell"),
        (1, float("nan"), "too small to tell"),
    ],
)
def test_a_verdict_is_the_frozen_models(sign: float, effect: float, verdict: str) -> None:
    assert judge(sign, effect, 0.1) == verdict
