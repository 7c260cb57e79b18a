"""Verdicts follow from real interventions; wording follows from the claim."""

from __future__ import annotations

import pytest

from rldecoder.explain.claims import Claim, claim_sentence, explanation_text, judge


def make_claim(**changes: object) -> Claim:
    values: dict[str, object] = {
        "latent": 12, "label": "months", "evidence_position": 3, "evidence_text": " May",
        "direction": "supports", "strength": 0.3, "noise": 0.1, "output_token": " 5",
        "probability": 0.4, "sure": 0.914,
    }  # fmt: skip
    return Claim(**{**values, **changes})  # type: ignore[arg-type]


def test_sentence() -> None:
    assert claim_sentence(make_claim()) == (
        "Feature #12 “months”, most active at “␣May” (token 3), speaks for “␣5”: "
        "without it, p would fall from 0.40 to 0.30 (-0.30 nats; 91 % sure)."
    )
    against = claim_sentence(make_claim(direction="opposes", strength=0.05, label=None))
    assert "#12, most active" in against
    assert "speaks against “␣5”" in against
    assert "p would rise from 0.40 to 0.42 (+0.05 nats" in against
    unnamed = claim_sentence(make_claim(label=None, description="raises “a”\u202e"))
    assert unnamed.startswith("Feature #12 (raises “a”⟨U+202E⟩), most active at")
    # No probability is above one.
    assert "to 1.00 (+2.00" in claim_sentence(make_claim(direction="opposes", strength=2.0))


def test_no_claims_say_so() -> None:
    # What the explainer expects, not what was measured: nobody removed every feature.
    assert explanation_text(" 5", 0.4, []) == (
        "The model expects “␣5” (p 0.40). Method B names no reason: it expects no single feature "
        "to move this prediction clearly more than a random direction would."
    )


def test_reasons_for_and_against_are_counted() -> None:
    both = [make_claim(), make_claim(), make_claim(direction="opposes")]
    text = explanation_text(" 5", 0.4, both)
    assert text.startswith(
        "The model expects “␣5” (p 0.40); two features speak for it, one feature speaks against it."
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
