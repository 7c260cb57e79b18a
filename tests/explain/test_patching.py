"""Exact effects against a loop that really runs the decoder."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import Places
from rldecoder.explain import patching
from rldecoder.explain.pairs import Pairs
from rldecoder.sae.model import SparseLatents
from rldecoder.seeds import torch_generator


def brute_force(
    decoder: SaeDecoderForCausalLM, latents: SparseLatents, shares: dict[int, float], token: int
) -> float:
    """log p(token) lost when each latent's activation is reduced by a share; one position."""
    before = decoder.logits(latents).log_softmax(-1)[token]
    return float(before - patched_logits(decoder, latents, shares).log_softmax(-1)[token])


def patched_logits(
    decoder: SaeDecoderForCausalLM, latents: SparseLatents, shares: dict[int, float]
) -> torch.Tensor:
    """[V]: the decoder's logits when each latent's activation is reduced by a share."""
    acts = latents.acts.clone()
    for slot, latent in enumerate(latents.indices.tolist()):
        acts[slot] *= 1 - shares.get(latent, 0.0)
    return decoder.logits(SparseLatents(acts, latents.indices))


def test_effects_equal_brute_force(decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]) -> None:
    found = pairs["label"]
    for row in range(0, 60, 7):
        latents = SparseLatents(
            found.positions.latents.acts[row], found.positions.latents.indices[row]
        )
        token = int(found.candidates.tokens[row])
        assert token == int(decoder.logits(latents).argmax())
        named = found.candidates.indices[row].tolist()
        for slot, latent in enumerate(named):
            expected = brute_force(decoder, latents, {latent: 1.0}, token)
            assert float(found.measured.single[row, slot]) == pytest.approx(expected, abs=2e-5)
        for m in range(3):
            shares = dict(zip(named, found.removals[row, m].tolist(), strict=True))
            expected = brute_force(decoder, latents, shares, token)
            assert float(found.measured.joint[row, m]) == pytest.approx(expected, abs=2e-5)
            logits = patched_logits(decoder, latents, shares)
            lead = logits[token] - torch.cat([logits[:token], logits[token + 1 :]]).max()
            assert float(found.measured.margins[row, m]) == pytest.approx(float(lead), abs=2e-5)


@pytest.mark.parametrize(("positions", "vocabulary"), [(1, 100), (7, 511), (64, 512), (1024, 9999)])
def test_blocks_do_not_change_effects(
    decoder: SaeDecoderForCausalLM,
    pairs: dict[str, Pairs],
    monkeypatch: pytest.MonkeyPatch,
    positions: int,
    vocabulary: int,
) -> None:
    found = pairs["label"]
    monkeypatch.setattr(patching, "POSITIONS_PER_BLOCK", positions)
    monkeypatch.setattr(patching, "PLACES_PER_CHUNK", 2 * positions)
    monkeypatch.setattr(patching, "VOCABULARY_PER_BLOCK", vocabulary)
    again = patching.measure(decoder, found.positions.places, found.candidates, found.removals)
    torch.testing.assert_close(again.single, found.measured.single, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.joint, found.measured.joint, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.margins, found.measured.margins, atol=1e-5, rtol=1e-5)


def test_soft_capped_logits_and_overflow_take_the_direct_path(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pairs["label"]
    latents = SparseLatents(*(column[:5] for column in found.positions.latents))
    monkeypatch.setattr(decoder.frozen.lm.model.config, "final_logit_softcapping", 2.0, False)
    candidates = patching.find_candidates(decoder, Places(latents), 4)
    capped = patching.measure(decoder, Places(latents), candidates, found.removals[:5, :, :4])
    assert capped.margins.shape == (5, 3)
    shares = dict(
        zip(candidates.indices[3].tolist(), found.removals[3, 1, :4].tolist(), strict=True)
    )
    named = SparseLatents(latents.acts[3], latents.indices[3])
    logits = patched_logits(decoder, named, shares)
    best, lead = int(candidates.tokens[3]), float(capped.margins[3, 1])
    rivals = torch.cat([logits[:best], logits[best + 1 :]])
    assert lead == pytest.approx(float(logits[best] - rivals.max()), abs=1e-5)
    row = SparseLatents(latents.acts[3], latents.indices[3])
    latent, token = int(candidates.indices[3, 1]), int(candidates.tokens[3])
    expected = brute_force(decoder, row, {latent: 1.0}, token)
    assert float(capped.single[3, 1]) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(decoder.frozen.lm.model.config, "final_logit_softcapping", None, False)
    loud = SparseLatents(latents.acts * 300, latents.indices)
    candidates = patching.find_candidates(decoder, Places(loud), 4)
    effects = patching.measure(decoder, Places(loud), candidates).single
    assert bool(effects.isfinite().all())
    row = SparseLatents(loud.acts[3], loud.indices[3])
    latent, token = int(candidates.indices[3, 1]), int(candidates.tokens[3])
    expected = brute_force(decoder, row, {latent: 1.0}, token)
    assert float(effects[3, 1]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_attributions_are_the_derivative_of_the_effects(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    found = pairs["label"]
    share = 0.01
    removals = share * torch.eye(found.candidates.acts.shape[1]).expand(60, -1, -1)
    small = patching.measure(decoder, found.positions.places, found.candidates, removals).joint
    torch.testing.assert_close(small / share, found.candidates.attributions, atol=0.02, rtol=0.05)


def test_candidates_are_active_and_have_the_largest_contributions(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    found = pairs["label"]
    latents = found.positions.latents
    everything = decoder.contributions(latents, found.candidates.tokens).abs()
    expected = everything.sort(-1, descending=True).values[:, :8]
    torch.testing.assert_close(found.candidates.contributions.abs(), expected)
    active = (latents.indices[:, :, None] == found.candidates.indices[:, None]).any(1)
    assert bool(active.all())


def test_random_removals_touch_only_active_candidates() -> None:
    acts = torch.tensor([[1.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    removals = patching.random_removals(acts, 200, torch_generator(0), share=0.5)
    assert set(removals.unique().tolist()) == {0.0, 0.5}
    assert bool((removals[:, :, 2] == 0).all())
    assert bool((removals[1] == 0).all())
    sizes = (removals[0] > 0).sum(-1)
    assert set(sizes.tolist()) == {1, 2, 3}


def test_ablate_zeroes_one_latent() -> None:
    latents = SparseLatents(torch.tensor([[1.0, 2.0]]), torch.tensor([[7, 3]]))
    assert patching.ablate(latents, torch.tensor([3])).acts.tolist() == [[1.0, 0.0]]


def test_noise_floor_is_what_random_directions_do(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    found = pairs["label"]
    latents = found.positions.latents
    for share in (0.05, 0.5):
        candidates = found.candidates._replace(acts=found.candidates.acts * share)
        rows = decoder.W.norm(dim=-1)[candidates.indices]
        floor = patching.noise_floor(candidates, rows)
        norms = rows * candidates.acts
        generator = torch_generator(0, int(100 * share))
        direction = torch.randn(40, 60, 8, 64, generator=generator)
        direction = direction / direction.norm(dim=-1, keepdim=True) * norms[..., None]
        hidden = decoder.hidden(latents)
        after = decoder.frozen.lm.unembed(hidden[:, None] - direction).log_softmax(-1)
        tokens = candidates.tokens[None, :, None, None].expand(40, 60, 8, 1)
        effects = candidates.logprobs[None, :, None] - after.gather(-1, tokens)[..., 0]
        exceeded = (effects.abs() > floor).float().mean()
        assert 0.015 < float(exceeded) < 0.075
