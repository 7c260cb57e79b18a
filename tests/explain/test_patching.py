"""The decoder's own effects, against a loop that really runs it; random removals."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain import patching
from rldecoder.explain.pairs import Pairs
from rldecoder.sae.model import SparseLatents
from rldecoder.seeds import torch_generator


@pytest.mark.parametrize("rows", [3, 256])
def test_decoder_effects_equal_reruns(
    decoder: SaeDecoderForCausalLM,
    pairs: dict[str, Pairs],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
    monkeypatch.setattr(patching, "LOGIT_ROWS", rows)
    found = pairs["label"]
    named = found.candidates.indices[:, :3].clone()
    latents = found.positions.latents
    absent = next(i for i in range(160) if i not in latents.indices[7].tolist())
    named[7, 2] = absent
    tokens = found.candidates.tokens
    effects = patching.decoder_effects(decoder, found.positions.places, tokens, named)
    for row in range(0, 60, 7):
        here = SparseLatents(latents.acts[row], latents.indices[row])
        before = decoder.logits(here).log_softmax(-1)[tokens[row]]
        for slot, latent in enumerate(named[row].tolist()):
            acts = here.acts * (here.indices != latent)
            after = decoder.logits(SparseLatents(acts, here.indices)).log_softmax(-1)[tokens[row]]
            expected = float(before - after)
            assert float(effects[row, slot]) == pytest.approx(expected, abs=2e-5)
    assert float(effects[7, 2]) == 0.0
    assert float(effects.abs().max()) > 0.01


def test_decoder_attributions_are_derivatives(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    places = pairs["label"].positions.places
    found = patching.decoder_attributions(decoder, places)
    latents = places.latents
    before = decoder.logits(latents).log_softmax(-1)
    token = before.argmax(-1, keepdim=True)
    for slot in (0, 5):
        acts = latents.acts.clone()
        acts[:, slot] *= 0.99
        after = decoder.logits(SparseLatents(acts, latents.indices)).log_softmax(-1)
        lost = (before - after).gather(-1, token)[:, 0]
        torch.testing.assert_close(100 * lost, found[:, slot], atol=0.02, rtol=0.05)


def test_random_removals_touch_only_active_candidates() -> None:
    acts = torch.tensor([[1.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    removals = patching.random_removals(acts, 200, torch_generator(0), share=0.5)
    assert set(removals.unique().tolist()) == {0.0, 0.5}
    assert bool((removals[:, :, 2] == 0).all())
    assert bool((removals[1] == 0).all())
    sizes = (removals[0] > 0).sum(-1)
    assert set(sizes.tolist()) == {1, 2, 3}
