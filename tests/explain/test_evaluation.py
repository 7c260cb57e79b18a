"""Scores of claims against known truths, and a comparison that can fail."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.evaluation import (
    ClaimSet,
    claims_of_baselines,
    evaluate_claims,
    evaluate_reconstruction,
    score_claims,
)
from rldecoder.explain.explainer import Explainer, Pointers, make_slots
from rldecoder.explain.pairs import Pairs
from rldecoder.explain.patching import noise_floor
from rldecoder.seeds import torch_generator


def oracle(pairs: Pairs) -> Pointers:
    """Pointers of someone who knows the exact effects."""
    effects = pairs.measured.single
    silent = torch.zeros_like(effects)
    return Pointers(effects.abs().log(), torch.ones_like(effects), effects, silent)


def floor_of(decoder: SaeDecoderForCausalLM, pairs: Pairs) -> torch.Tensor:
    """The noise floor of every candidate."""
    norms = decoder.W[pairs.candidates.indices].norm(dim=-1)
    return noise_floor(pairs.candidates, norms)


def test_true_claims_are_supported_and_false_ones_are_not(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    mask = torch.ones_like(test.candidates.acts, dtype=torch.bool)
    signs = test.measured.single.sign()
    true = score_claims(decoder, test, ClaimSet(test.candidates.indices, signs, mask), 0.0)
    torch.testing.assert_close(true.effects, test.measured.single, atol=1e-5, rtol=1e-5)
    assert bool(true.right_sign.all())
    floor = floor_of(decoder, test)
    assert torch.equal(true.supported, test.measured.single.abs() > floor)
    false = score_claims(decoder, test, ClaimSet(test.candidates.indices, -signs, mask), 0.0)
    assert not bool(false.supported.any())
    least = float(test.measured.single.abs().quantile(0.9))
    above = score_claims(decoder, test, ClaimSet(test.candidates.indices, signs, mask), least)
    assert 0 < float(above.supported.float().mean()) <= 0.1
    hidden = score_claims(decoder, test, ClaimSet(test.candidates.indices, signs, ~mask), 0.0)
    assert not bool(hidden.supported.any())


def test_features_that_are_not_active_have_no_effect(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    active = set(test.positions.latents.indices[0].tolist())
    absent = next(latent for latent in range(160) if latent not in active)
    latents = torch.full((60, 1), absent)
    claims = ClaimSet(latents, torch.ones(60, 1), torch.ones(60, 1, dtype=torch.bool))
    assert float(score_claims(decoder, test, claims, 0.0).effects[0, 0]) == pytest.approx(
        0.0, abs=1e-5
    )


def test_baselines_claim_as_often_as_method_b(
    explainer: Explainer, pairs: dict[str, Pairs]
) -> None:
    explainer.scales.fill_(1.0)
    mask = torch.rand(60, 3) > 0.4
    silent = torch.zeros_like(pairs["test"].candidates.acts)
    found = claims_of_baselines(
        explainer, pairs["label"], pairs["test"], mask, silent, torch_generator(0)
    )
    assert set(found) == {
        "method_a", "attribution_top_k", "attribution_above_noise", "mean_explanation",
        "prompt_only", "random_features",
    }  # fmt: skip
    latents = pairs["test"].positions.latents
    for name, claims in found.items():
        assert torch.equal(claims.mask, mask), name
        if not name.startswith("attribution"):
            assert claims.signs.abs().unique().tolist() == [1.0], name
    # Equal scales: Method A is the order of the activations.
    strongest = latents.indices.gather(1, latents.acts.topk(3).indices)
    assert torch.equal(found["method_a"].latents, strongest)
    assert bool((found["mean_explanation"].latents == found["mean_explanation"].latents[0]).all())


def test_an_oracle_beats_every_baseline(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    explainer.scales.fill_(1.0)
    test = pairs["test"]
    knowing = oracle(test)._replace(noise=floor_of(decoder, test))
    result = evaluate_claims(
        decoder,
        explainer,
        pairs["label"],
        test,
        knowing,
        generator=torch_generator(0),
        resamples=200,
        seed=0,
    )
    methods = result["methods"]
    assert methods["method_b"]["precision"] == 1.0
    assert methods["method_b"]["contradicted"] == 0.0
    for name in ("method_a", "mean_explanation", "random_features"):
        assert methods[name]["precision"] < 0.95
        assert result["method_b_against"][name]["pvalue"] < 0.05
    assert methods["random_features"]["precision"] < 0.3
    assert methods["method_b"]["strength_mae_nats"] == pytest.approx(0.0, abs=1e-4)
    assert methods["attribution_top_k"]["strength_mae_nats"] > 0.01
    assert methods["method_a"]["strength_mae_nats"] is None


def test_no_claim_at_all_gives_no_numbers(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    explainer.spec = explainer.spec.model_copy(update={"min_effect": 1e9})
    result = evaluate_claims(
        decoder,
        explainer,
        pairs["label"],
        pairs["test"],
        oracle(pairs["test"]),
        generator=torch_generator(0),
        resamples=100,
        seed=0,
    )
    assert result["methods"] == {}
    assert result["abstention"] == 1.0


def test_reconstruction_is_measured_on_seen_and_unseen_interventions(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    pointers = explainer(make_slots(explainer, decoder, test.candidates))
    found = evaluate_reconstruction(decoder, explainer, test, pointers, torch_generator(0))
    assert set(found) == {"removal", "halving"}
    expected = float(test.measured.joint.abs().mean())
    assert found["removal"]["zero_mae_nats"] == pytest.approx(expected)
    # Half a removal changes less, and is closer to its first-order estimate.
    assert found["halving"]["zero_mae_nats"] < expected
    assert found["halving"]["first_order_mae_nats"] < found["removal"]["first_order_mae_nats"]
