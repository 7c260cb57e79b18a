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
    noise_on_frozen,
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
    ("sign", "effect", "frozen", "verdict"),
    [
        (1, 0.5, 0.4, "supported"),
        (-1, -0.5, -0.4, "supported"),
        (1, 0.5, -0.03, "decoder only"),
        (1, 0.5, 0.3, "decoder only"),  # what chance does to the frozen model
        (-1, -0.5, -0.3, "decoder only"),
        (1, 0.5, -0.9, "decoder only"),
        (-1, -0.5, 0.9, "decoder only"),
        (1, 0.5, None, "decoder only"),
        (1, 0.5, float("nan"), "decoder only"),
        (1, -0.5, 0.9, "contradicted"),
        (-1, 0.5, -0.9, "contradicted"),
        (1, 0.1, 0.9, "too small to tell"),
        (-1, 0.1, -0.9, "too small to tell"),
    ],
)
def test_a_claim_is_supported_by_both_models_or_not_at_all(
    sign: float, effect: float, frozen: float | None, verdict: str
) -> None:
    assert judge(sign, effect, 0.1, frozen, 0.3) == verdict


def test_the_claims_own_noise_counts_where_the_frozen_model_has_none() -> None:
    assert judge(1, 0.5, 0.1, 0.2) == "supported"
    assert judge(1, 0.5, 0.1, 0.05) == "decoder only"


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
    text = resid[0].clone()
    resid[0, -1] -= act * sae.W_dec[latent]
    before = lm.unembed(final[0, -1]).log_softmax(-1)[7]
    after = lm.unembed(lm.tail(resid, 2)[0, -1]).log_softmax(-1)[7]
    measured = verify_on_frozen(decoder, text, latents, 7, [latent])
    assert measured == pytest.approx([float(before - after)], abs=1e-4)
    assert abs(measured[0]) > 1e-3


def test_the_frozen_models_noise_is_what_random_directions_do(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae
) -> None:
    """95 % of short random directions stay below it; it grows with the feature's length."""
    ids = torch.tensor([5, 90, 300, 17, 44])
    trace = decoder.features(ids[None]).latents
    latents = SparseLatents(trace.acts[0, -1] * 0.01, trace.indices[0, -1])
    named = latents.indices[:2].tolist()
    resid, final = lm.resid_and_final(ids[None], 2)
    first, second = noise_on_frozen(decoder, resid[0], latents, 7, named)
    lengths = latents.acts[:2] * sae.W_dec[named].norm(dim=-1)
    assert second / first == pytest.approx(float(lengths[1] / lengths[0]), rel=1e-4)
    lot = torch.randn(1500, lm.d_model, generator=torch.Generator().manual_seed(0))
    moved = resid.expand(len(lot), -1, -1).clone()
    moved[:, -1] -= float(lengths[0]) * lot / lot.norm(dim=-1, keepdim=True)
    before = lm.unembed(final[0, -1]).log_softmax(-1)[7]
    effects = before - lm.unembed(lm.tail(moved, 2)[:, -1]).log_softmax(-1)[:, 7]
    assert float((effects.abs() < first).float().mean()) == pytest.approx(0.95, abs=0.02)
    absent = next(i for i in range(160) if i not in latents.indices.tolist())
    assert noise_on_frozen(decoder, resid[0], latents, 7, [absent]) == [0.0]
    assert noise_on_frozen(decoder, resid[0], latents, 7, []) == []
