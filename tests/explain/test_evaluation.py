"""Scores of claims against known truths, and a comparison that can fail."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.claim_scores import Renaming
from rldecoder.explain.claims import judge
from rldecoder.explain.evaluation import (
    ClaimScores,
    Settings,
    count_verdicts,
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
    norms = decoder.frozen.sae.W_dec[pairs.candidates.indices].norm(dim=-1)
    return noise_floor(pairs.candidates, norms)


def claim(latents: torch.Tensor, signs: torch.Tensor, mask: torch.Tensor) -> ClaimSet:
    return ClaimSet(latents, signs, mask, signs)


def score(
    decoder: SaeDecoderForCausalLM, test: Pairs, claims: ClaimSet, min_effect: float
) -> ClaimScores:
    return score_claims(decoder, test, {"mine": claims}, min_effect)["mine"]


def test_true_claims_are_supported_and_false_ones_are_not(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    mask = torch.ones_like(test.candidates.acts, dtype=torch.bool)
    signs = test.measured.single.sign()
    true = score(decoder, test, claim(test.candidates.indices, signs, mask), 0.0)
    torch.testing.assert_close(true.effects, test.measured.single, atol=1e-4, rtol=1e-4)
    assert bool(true.right_sign.all())
    floor = floor_of(decoder, test)
    assert torch.equal(true.supported, test.measured.single.abs() > floor)
    # The verdict that a single explanation gets is the same.
    verdicts = [
        judge(sign, effect, noise) == "supported"
        for sign, effect, noise in zip(
            signs.flatten().tolist(), true.effects.flatten().tolist(), floor.flatten().tolist(),
            strict=True,
        )
    ]  # fmt: skip
    assert true.supported.flatten().tolist() == verdicts
    assert 0.02 < float(true.decoder_agrees.float().mean()) < 1
    false = score(decoder, test, claim(test.candidates.indices, -signs, mask), 0.0)
    assert not bool(false.supported.any())
    least = float(test.measured.single.abs().quantile(0.9))
    above = score(decoder, test, claim(test.candidates.indices, signs, mask), least)
    assert 0 < float(above.supported.float().mean()) <= 0.1
    hidden = score(decoder, test, claim(test.candidates.indices, signs, ~mask), 0.0)
    assert not bool(hidden.supported.any())


def test_features_that_are_not_active_have_no_effect(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    active = set(test.positions.latents.indices[0].tolist())
    absent = next(latent for latent in range(160) if latent not in active)
    latents = torch.full((60, 1), absent)
    claims = claim(latents, torch.ones(60, 1), torch.ones(60, 1, dtype=torch.bool))
    found = score(decoder, test, claims, 0.0)
    assert float(found.effects[0, 0]) == 0.0
    assert not bool(found.supported[0, 0] | found.decoder_agrees[0, 0])


def test_what_several_methods_claim_is_scored_as_if_alone(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    latents, effects = test.candidates.indices, test.measured.single
    some = torch.rand(60, 3, generator=torch_generator(3)) > 0.3
    first = ClaimSet(latents[:, :3], effects[:, :3], some, effects[:, :3])
    second = claim(latents[:, 2:6], -effects[:, 2:6].sign(), torch.ones(60, 4, dtype=torch.bool))
    together = score_claims(decoder, test, {"a": first, "b": second}, 0.0)
    for name, claims in (("a", first), ("b", second)):
        alone = score(decoder, test, claims, 0.0)
        for column, expected in zip(together[name], alone, strict=True):
            mask = claims.mask
            torch.testing.assert_close(column[mask], expected[mask], atol=1e-4, rtol=1e-3)
    expected = effects[:, :3][some]
    torch.testing.assert_close(together["a"].effects[some], expected, atol=1e-4, rtol=1e-3)


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
    assert methods["method_b"].strength_mae_nats == pytest.approx(0.0, abs=1e-3)
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
        decoder, explainer, pairs["label"], pairs["test"], NONE_HELD_OUT,
        torch_generator(0), SETTINGS,
        example_verdicts=count_verdicts([]),
        renamed_labels=Renaming(num_examples=0, num_unchanged=0),
    )  # fmt: skip
    assert result.methods == {}
    assert result.abstention == 1.0
    assert result.simulatability.kinds == {}
    assert result.example_verdicts == {
        "supported": 0, "contradicted": 0, "too small to tell": 0,
    }  # fmt: skip
    assert result.headline["claim_precision"] is None
    assert result.reasons == ("no held-out prediction got any claim",)


def test_reconstruction_is_measured_on_seen_and_unseen_interventions(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    pointers = explainer(make_slots(explainer, decoder.frozen.sae, test.candidates))
    found = evaluate_reconstruction(decoder.frozen, explainer, test, pointers, torch_generator(0))
    expected = float(test.measured.joint.abs().mean())
    assert found.removal.zero_mae_nats == pytest.approx(expected)
    # Half a removal changes less, and is closer to its first-order estimate.
    assert found.halving.zero_mae_nats < expected
    assert found.halving.first_order_mae_nats < found.removal.first_order_mae_nats
