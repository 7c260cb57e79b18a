"""The spread of contributions on text: exact for linear decoders, by differences with blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.sequences import hidden_of_rows
from rldecoder.evals.prompts import make_prompts
from rldecoder.rl import core
from rldecoder.rl import spread as spread_module
from rldecoder.rl.controls import System, compare, control_rows
from rldecoder.rl.rollout import DecoderSampler
from rldecoder.rl.spread import (
    Spread,
    contributions_on_text,
    response_spread,
    sequence_spread,
)
from rldecoder.rl.states import predict
from rldecoder.sae.selection import SparseLatents
from rldecoder.seeds import torch_generator
from tests.rl.test_controls import GOOD, LOW, system


@pytest.fixture
def batch(tiny_cache):
    reader = ActivationReader(tiny_cache, "test")
    return next(reader.ordered(45, columns=("resid",), max_tokens=45))


def chosen_logits(decoder, latents, batch, tokens):
    hidden = hidden_of_rows(decoder, latents, batch.seq_id, batch.pos)
    logits = decoder.frozen.lm.unembed(hidden)
    return (logits.gather(-1, tokens[:, None])[:, 0] - logits.mean(-1)).sum()


def test_a_linear_decoders_contributions_are_its_exact_ones(make_decoder, batch):
    decoder = make_decoder(scale=0.05)
    latents = decoder.frozen.sae.encode(batch.resid.float())
    choices = decoder.logits(latents).argmax(-1)
    unembedding = decoder.frozen.lm.unembedding
    above_mean = unembedding[choices] - unembedding.mean(0)
    expected = latents.acts * (decoder.W[latents.indices] @ above_mean[:, :, None])[:, :, 0]
    torch.testing.assert_close(contributions_on_text(decoder, batch), expected)


def test_with_blocks_they_are_slopes_of_all_chosen_logits(make_decoder, batch):
    decoder = make_decoder(blocks=[2, 3], scale=0.05)
    found = contributions_on_text(decoder, batch)
    latents = decoder.frozen.sae.encode(batch.resid.float())
    hidden = hidden_of_rows(decoder, latents, batch.seq_id, batch.pos)
    choices = decoder.frozen.lm.unembed(hidden).argmax(-1)
    for row, slot in ((3, 0), (7, 1), (28, 0)):
        moved = []
        for sign in (1, -1):
            acts = latents.acts.clone()
            acts[row, slot] *= 1 + sign * 0.01
            with torch.no_grad():
                changed = SparseLatents(acts, latents.indices)
                moved.append(float(chosen_logits(decoder, changed, batch, choices)))
        slope = (moved[0] - moved[1]) / 0.02
        assert float(found[row, slot]) == pytest.approx(slope, rel=0.03, abs=2e-3)


def test_sequences_are_averaged(make_decoder, tiny_cache, batch):
    decoder = make_decoder(scale=0.05)
    found = sequence_spread({"a": decoder}, ActivationReader(tiny_cache, "test"), 45)["a"]
    entropy = core.contribution_entropy(contributions_on_text(decoder, batch)).double().numpy()
    expected = [entropy[(batch.seq_id == seq).numpy()].mean() for seq in batch.seq_id.unique()]
    np.testing.assert_allclose(found.entropy, expected, rtol=1e-5)
    assert ((found.effective >= 1) & (found.effective <= decoder.frozen.sae.spec.k)).all()


def test_the_difference_is_reported_with_its_interval():
    def with_entropy(name: str, mean: float) -> System:
        values = mean + np.linspace(-0.05, 0.05, len(LOW))
        return system(name, [GOOD], [LOW])._replace(spread=[Spread(values, 10 * values)])

    found = compare(with_entropy("trained", 0.6), with_entropy("supervised", 0.8), seed=0)
    assert found.entropy_difference == pytest.approx(0.2)
    assert found.entropy_low == pytest.approx(0.2)
    row = control_rows(with_entropy("trained", 0.6), seed=0)[0]
    low, high = row.contribution_entropy_low, row.contribution_entropy_high
    assert row.contribution_entropy == pytest.approx(0.6)
    assert low < 0.6 < high
    assert row.effective_latents == pytest.approx(6.0)
    nothing = compare(with_entropy("trained", 0.6), system("frozen", [GOOD], [LOW]), seed=0)
    assert nothing.entropy_difference is None


@pytest.mark.parametrize("blocks", [(), (2, 3)])
def test_responses_are_measured_as_the_rewards_are(make_decoder, blocks):
    decoder = make_decoder(blocks=blocks, scale=0.05)
    prompts = make_prompts("cloze", "test", 3, 0)
    found = response_spread(decoder, prompts, temperature=0.7, seed=0)
    again = response_spread(decoder, prompts, temperature=0.7, seed=0)
    np.testing.assert_array_equal(found.entropy, again.entropy)
    sampler = DecoderSampler(decoder, temperature=0.7, frozen_states=False)
    rollout = sampler(prompts, torch_generator(0, "responses"))
    for row in range(3):
        keep = rollout.mask[row].bool()
        latents = SparseLatents(rollout.latents.acts[row][keep], rollout.latents.indices[row][keep])
        slopes = predict(decoder, rollout, torch.tensor([row]), slopes=True).slopes
        used = decoder.along(latents, slopes).detach()
        assert found.entropy[row] == pytest.approx(
            float(core.contribution_entropy(used).mean()), rel=1e-4
        )
        assert found.effective[row] == pytest.approx(
            float(core.effective_latents(used).mean()), rel=1e-4
        )


def test_many_responses_are_sampled_in_parts(make_decoder, monkeypatch):
    decoder = make_decoder(scale=0.05)
    prompts = make_prompts("cloze", "test", 5, 0)
    first = response_spread(decoder, prompts[:2], temperature=0.7, seed=0)
    monkeypatch.setattr(spread_module, "_RESPONSES", 2)
    found = response_spread(decoder, prompts, temperature=0.7, seed=0)
    assert found.entropy.shape == found.effective.shape == (5,)
    np.testing.assert_allclose(found.entropy[:2], first.entropy)
    np.testing.assert_allclose(found.effective[:2], first.effective)
