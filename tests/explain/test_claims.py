"""Verdicts follow from real interventions; wording follows from the claim."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.claims import (
    Claim,
    claim_sentence,
    explanation_text,
    judge,
    verify_on_decoder,
    verify_on_frozen,
)
from rldecoder.explain.pairs import Pairs
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SparseLatents


def make_claim(**changes: object) -> Claim:
    values: dict[str, object] = {
        "latent": 12, "label": "months", "evidence_position": 3, "evidence_text": " May",
        "direction": "supports", "strength": 0.3, "noise": 0.1, "output_token": " 5",
        "probability": 0.4,
    }  # fmt: skip
    return Claim(**{**values, **changes})  # type: ignore[arg-type]


def test_sentence() -> None:
    assert claim_sentence(make_claim()) == (
        "Feature #12 “months”, most active at “␣May” (token 3), supports “␣5”: "
        "without it, log p would be 0.30 nats lower."
    )
    weak = claim_sentence(make_claim(direction="opposes", strength=0.05, label=None))
    assert "#12, most active" in weak
    assert "slightly opposes" in weak
    assert "0.05 nats higher" in weak
    assert "strongly supports" in claim_sentence(make_claim(strength=0.9))


def test_no_claims_say_so() -> None:
    # What the explainer expects, not what was measured: nobody removed every feature.
    assert explanation_text([]) == (
        "Method B makes no claim here: it expects no single feature to move this prediction "
        "clearly more than a random direction would."
    )
    assert explanation_text([make_claim(), make_claim()]).count("Feature #12") == 2


@pytest.mark.parametrize(
    ("sign", "effect", "verdict"),
    [
        (1, 0.5, "supported"),
        (-1, -0.5, "supported"),
        (1, -0.5, "contradicted"),
        (-1, 0.5, "contradicted"),
        (1, 0.1, "too small to tell"),
        (-1, 0.1, "too small to tell"),
    ],
)
def test_verdicts(sign: float, effect: float, verdict: str) -> None:
    assert judge(sign, effect, noise=0.1) == verdict


def test_decoder_verification_agrees_with_the_patches(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    found = pairs["test"]
    latents = SparseLatents(found.positions.latents.acts[5:6], found.positions.latents.indices[5:6])
    named = found.candidates.indices[5].tolist()
    measured = verify_on_decoder(decoder, latents, int(found.candidates.tokens[5]), named)
    assert measured == pytest.approx(found.measured.single[5].tolist(), abs=2e-5)
    absent = next(i for i in range(160) if i not in latents.indices.tolist())
    assert verify_on_decoder(decoder, latents, 3, [absent]) == pytest.approx([0.0], abs=1e-6)
    assert verify_on_decoder(decoder, latents, 3, []) == []


def test_frozen_verification_removes_the_direction_and_nothing_else(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae
) -> None:
    ids = torch.tensor([5, 90, 300, 17, 44])
    trace = decoder.features(ids[None]).latents
    latents = SparseLatents(trace.acts[0, -1], trace.indices[0, -1])
    latent, act = int(latents.indices[0]), float(latents.acts[0])
    resid, final = lm.resid_and_final(ids[None], 2)
    resid[0, -1] -= act * sae.W_dec[latent]
    before = lm.unembed(final[0, -1]).log_softmax(-1)[7]
    after = lm.unembed(lm.tail(resid, 2)[0, -1]).log_softmax(-1)[7]
    measured = verify_on_frozen(decoder, ids, latents, 7, [latent])
    assert measured == pytest.approx([float(before - after)], abs=1e-4)
    assert abs(measured[0]) > 1e-3
