"""What the simpler methods claim, and with which strengths."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.explainer import Explainer, make_slots
from rldecoder.explain.methods import acts_of, claims_of_baselines, claims_of_method_b, point
from rldecoder.explain.pairs import Pairs
from rldecoder.seeds import torch_generator
from tests.explain.conftest import CANDIDATES


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
        assert all(len(set(row)) == 3 for row in claims.latents.tolist()), name
        if not name.startswith("attribution"):
            assert claims.signs.abs().unique().tolist() == [1.0], name
    # Equal scales: Method A is the order of the activations.
    strongest = latents.indices.gather(1, latents.acts.topk(3).indices)
    assert torch.equal(found["method_a"].latents, strongest)
    assert bool((found["mean_explanation"].latents == found["mean_explanation"].latents[0]).all())
    normalised = latents.acts.topk(3).values
    torch.testing.assert_close(found["method_a"].strengths, normalised)
    assert bool((found["random_features"].strengths == 1).all())


def test_attributions_above_noise_are_ranked_among_themselves(
    explainer: Explainer, pairs: dict[str, Pairs]
) -> None:
    """A thousandth of a nat decides, and one below its noise floor comes after all above theirs."""
    test = pairs["test"]
    sizes = 0.5 + 0.001 * torch.stack([torch.randperm(CANDIDATES) for _ in range(60)])
    test = test._replace(candidates=test.candidates._replace(attributions=-sizes))
    noise = torch.zeros_like(sizes)
    noise.scatter_(1, sizes.argmax(dim=-1, keepdim=True), 9.0)
    mask = torch.ones(60, 3, dtype=torch.bool)

    found = claims_of_baselines(explainer, pairs["label"], test, mask, noise, torch_generator(0))
    expected = test.candidates.indices.gather(1, sizes.topk(4).indices[:, 1:])
    assert torch.equal(found["attribution_above_noise"].latents, expected)


def test_mean_effects_are_the_means_of_the_training_pairs(
    explainer: Explainer, pairs: dict[str, Pairs]
) -> None:
    train, test = pairs["label"], pairs["test"]
    mask = torch.ones(60, 3, dtype=torch.bool)
    silent = torch.zeros_like(test.candidates.acts)
    found = claims_of_baselines(explainer, train, test, mask, silent, torch_generator(0))
    indices, effects = train.candidates.indices, train.measured.single
    sums = torch.zeros(explainer.spec.num_latents).index_add(
        0, indices.flatten(), effects.flatten()
    )
    everywhere = found["mean_explanation"]
    assert set(everywhere.latents[0].tolist()) == set(sums.abs().topk(3).indices.tolist())
    for latent, sign, strength in zip(
        everywhere.latents[0], everywhere.signs[0], everywhere.strengths[0], strict=True
    ):
        mine = effects[indices == latent]
        assert float(strength) == pytest.approx(float(mine.mean()), abs=1e-5)
        assert float(sign) == float(mine.sum().sign())
    token = int(train.positions.context_token[0])
    context = torch.full_like(test.positions.context_token, token)
    asked = test._replace(positions=test.positions._replace(context_token=context))
    after = claims_of_baselines(explainer, train, asked, mask, silent, torch_generator(0))[
        "prompt_only"
    ]
    rows = train.positions.context_token == token
    first = after.latents[0, 0]
    mine = effects[rows][indices[rows] == first]
    assert float(after.strengths[0, 0]) == pytest.approx(float(mine.mean()), abs=1e-5)


def test_method_b_in_parts_equals_the_whole(
    explainer: Explainer,
    decoder: SaeDecoderForCausalLM,
    pairs: dict[str, Pairs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    test = pairs["test"]
    whole = explainer(make_slots(explainer, decoder.frozen.sae, test.candidates))
    monkeypatch.setattr("rldecoder.explain.methods.POSITIONS_AT_ONCE", 7)
    parts = point(explainer, decoder.frozen.sae, test)
    torch.testing.assert_close(parts.effects, whole.effects.detach())
    claims = claims_of_method_b(explainer, parts, test)
    assert torch.equal(claims.mask.sum(-1), explainer.choose(parts).sum(-1))
    assert torch.equal(claims.strengths, claims.signs)


def test_activations_of_named_latents(pairs: dict[str, Pairs]) -> None:
    latents = pairs["test"].positions.latents
    torch.testing.assert_close(acts_of(latents, latents.indices[:, 3:5]), latents.acts[:, 3:5])
    absent = next(i for i in range(160) if i not in latents.indices[0].tolist())
    assert float(acts_of(latents, torch.full((60, 1), absent))[0, 0]) == 0.0
