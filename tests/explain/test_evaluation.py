"""Scores of claims against known truths, and a comparison that can fail."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.claim_scores import (
    AblationScores,
    EffectErrors,
    Reconstruction,
    Renaming,
)
from rldecoder.explain.evaluation import (
    Settings,
    agreement_with_frozen,
    compare_with_ablation,
    evaluate_claims,
    evaluate_explainer,
    evaluate_reconstruction,
    score_claims,
)
from rldecoder.explain.explainer import Explainer, Pointers, make_slots
from rldecoder.explain.methods import (
    METHOD_B,
    ClaimSet,
    claims_of_baselines,
    claims_of_method_b,
)
from rldecoder.explain.pairs import Pairs
from rldecoder.explain.patching import noise_floor
from rldecoder.seeds import torch_generator
from tests.explain.conftest import NUM_LATENTS

SETTINGS = Settings(interventions=3, resamples=200, seed=0)
NONE_HELD_OUT = torch.zeros(NUM_LATENTS, dtype=torch.bool)


def oracle(pairs: Pairs) -> Pointers:
    """Pointers of someone who knows the exact effects."""
    effects = pairs.measured.single
    silent = torch.zeros_like(effects)
    return Pointers(effects.abs().log(), torch.ones_like(effects), effects, silent)


def floor_of(decoder: SaeDecoderForCausalLM, pairs: Pairs) -> torch.Tensor:
    """The noise floor of every candidate."""
    norms = decoder.W[pairs.candidates.indices].norm(dim=-1)
    return noise_floor(pairs.candidates, norms)


def claim(latents: torch.Tensor, signs: torch.Tensor, mask: torch.Tensor) -> ClaimSet:
    return ClaimSet(latents, signs, mask, signs)


def test_true_claims_are_supported_and_false_ones_are_not(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    mask = torch.ones_like(test.candidates.acts, dtype=torch.bool)
    signs = test.measured.single.sign()
    true = score_claims(decoder, test, claim(test.candidates.indices, signs, mask), 0.0)
    torch.testing.assert_close(true.effects, test.measured.single, atol=1e-5, rtol=1e-5)
    assert bool(true.right_sign.all())
    floor = floor_of(decoder, test)
    assert torch.equal(true.supported, test.measured.single.abs() > floor)
    false = score_claims(decoder, test, claim(test.candidates.indices, -signs, mask), 0.0)
    assert not bool(false.supported.any())
    least = float(test.measured.single.abs().quantile(0.9))
    above = score_claims(decoder, test, claim(test.candidates.indices, signs, mask), least)
    assert 0 < float(above.supported.float().mean()) <= 0.1
    hidden = score_claims(decoder, test, claim(test.candidates.indices, signs, ~mask), 0.0)
    assert not bool(hidden.supported.any())


def test_features_that_are_not_active_have_no_effect(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    active = set(test.positions.latents.indices[0].tolist())
    absent = next(latent for latent in range(160) if latent not in active)
    latents = torch.full((60, 1), absent)
    claims = claim(latents, torch.ones(60, 1), torch.ones(60, 1, dtype=torch.bool))
    assert float(score_claims(decoder, test, claims, 0.0).effects[0, 0]) == pytest.approx(
        0.0, abs=1e-5
    )


def test_an_oracle_beats_every_baseline(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    explainer.scales.fill_(1.0)
    test = pairs["test"]
    knowing = oracle(test)._replace(noise=floor_of(decoder, test))
    ours = claims_of_method_b(explainer, knowing, test)
    baselines = claims_of_baselines(
        explainer, pairs["label"], test, ours.mask, knowing.noise, torch_generator(0)
    )
    held_out = torch.arange(NUM_LATENTS) % 3 == 0
    result = evaluate_claims(
        decoder, explainer, test, {METHOD_B: ours, **baselines}, held_out, SETTINGS
    )
    methods = result.methods
    assert methods["method_b"].precision == 1.0
    assert methods["method_b"].contradicted == 0.0
    for name in ("method_a", "mean_explanation", "random_features"):
        assert methods[name].precision < 0.95
        assert result.method_b_against[name].pvalue < 0.05
    assert methods["random_features"].precision < 0.3
    assert methods["method_b"].strength_mae_nats == pytest.approx(0.0, abs=1e-4)
    assert methods["attribution_top_k"].strength_mae_nats > 0.01
    assert methods["method_a"].strength_mae_nats is None
    # Claims about held-out and about other features are all of them, each once.
    unseen = held_out[ours.latents] & ours.mask
    for name, mask in (("held_out_features", unseen), ("other_features", ours.mask & ~unseen)):
        part = getattr(methods["method_b"], name)
        assert part.num_claims == int(mask.sum()) > 0
        assert part.num_positions == int(mask.any(-1).sum())
        assert part.precision == 1.0


def test_false_claims_about_held_out_features_lower_their_precision_alone(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    true = claims_of_method_b(explainer, oracle(test)._replace(noise=floor_of(decoder, test)), test)
    held_out = torch.arange(NUM_LATENTS) % 2 == 0
    wrong = torch.where(held_out[true.latents], -true.signs, true.signs)
    result = evaluate_claims(
        decoder, explainer, test, {METHOD_B: true._replace(signs=wrong)}, held_out, SETTINGS
    ).methods["method_b"]
    assert result.held_out_features is not None
    assert result.other_features is not None
    assert result.held_out_features.precision == 0.0
    assert result.other_features.precision == 1.0
    assert 0 < result.precision < 1


def test_no_claim_at_all_gives_no_numbers(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    explainer.spec = explainer.spec.model_copy(update={"min_effect": 1e9})
    result = evaluate_explainer(
        decoder, explainer, explainer, pairs["label"], pairs["test"], NONE_HELD_OUT,
        torch_generator(0), SETTINGS,
        frozen_model=agreement_with_frozen([]),
        renamed_labels=Renaming(num_examples=0, num_unchanged=0),
    )  # fmt: skip
    assert result.methods == {}
    assert result.abstention == 1.0
    assert result.simulatability.kinds == {}
    assert result.ablation is not None
    assert result.ablation.abstention == 1.0
    assert result.ablation.method_b_ahead is None
    # In JSON what nobody claimed is absent, and not null.
    assert "precision" not in result.model_dump(mode="json")["ablation"]
    assert result.headline["claim_precision"] is None
    assert result.reasons == ("no held-out prediction got any claim",)


def test_an_ablation_with_false_claims_is_behind_and_one_with_the_same_claims_is_not(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    ours = claims_of_method_b(explainer, oracle(test)._replace(noise=floor_of(decoder, test)), test)
    false = ours._replace(signs=-ours.signs)
    errors = EffectErrors(claims_mae_nats=0.0, zero_mae_nats=0.0, first_order_mae_nats=0.0)

    def compare(theirs: ClaimSet) -> AblationScores:
        return compare_with_ablation(
            decoder, explainer, test, ours, theirs, SETTINGS, abstention_with_gates=0.0,
            reconstruction=Reconstruction(removal=errors, halving=errors),
        )  # fmt: skip

    worse = compare(false)
    assert worse.precision == 0.0
    assert worse.method_b_ahead is not None
    assert worse.method_b_ahead.difference == 1.0
    assert worse.method_b_ahead.pvalue < 0.05
    same = compare(ours).method_b_ahead
    assert same is not None
    assert (same.difference, same.pvalue) == (0.0, 1.0)
    fewer = ours._replace(mask=ours.mask & (torch.arange(60) < 20)[:, None])
    expected = 1 - float(fewer.mask.any(-1).float().mean())
    assert compare(fewer).abstention == pytest.approx(expected)


def test_reconstruction_is_measured_on_seen_and_unseen_interventions(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    pointers = explainer(make_slots(explainer, decoder, test.candidates))
    found = evaluate_reconstruction(decoder, explainer, test, pointers, torch_generator(0))
    expected = float(test.measured.joint.abs().mean())
    assert found.removal.zero_mae_nats == pytest.approx(expected)
    # Half a removal changes less, and is closer to its first-order estimate.
    assert found.halving.zero_mae_nats < expected
    assert found.halving.first_order_mae_nats < found.removal.first_order_mae_nats
