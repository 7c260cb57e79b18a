"""Replay batches depend on the update only; the losses on them equal separate passes."""

from __future__ import annotations

import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.distill import LogitBuffers, chunked_kl_ce
from rldecoder.decoder.sequences import hidden_of_rows, slopes_of_choices
from rldecoder.rl import core
from rldecoder.rl.replay import Replay, ReplayBatch, text_losses
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.seeds import torch_generator


def test_any_step_gives_the_same_batch_as_an_undisturbed_run(tiny_cache):
    sae = Sae.random_init(SaeSpec(d_model=64, num_latents=96, k=16, hook_layer=2), seed=1)
    text = ActivationReader(tiny_cache, "train")
    straight = Replay(text, sae, num_tokens=50, seed=3)
    assert text.batches_per_epoch(50) == 3  # so that steps 3 and 6 begin new epochs
    batches = [straight(step) for step in range(8)]
    for start in (0, 2, 3, 7):
        resumed = Replay(ActivationReader(tiny_cache, "train"), sae, num_tokens=50, seed=3)
        for step in range(start, 8):
            again = resumed(step)
            assert torch.equal(again.frozen_hidden, batches[step].frozen_hidden)
            assert torch.equal(again.latents.acts, batches[step].latents.acts)
    assert not torch.equal(batches[0].frozen_hidden, batches[3].frozen_hidden)


def test_a_small_split_gives_what_it_has(tiny_cache):
    sae = Sae.random_init(SaeSpec(d_model=64, num_latents=96, k=16, hook_layer=2), seed=1)
    text = ActivationReader(tiny_cache, "train")
    replay = Replay(text, sae, num_tokens=10_000, seed=0)
    assert len(replay(0).frozen_hidden) == text.num_tokens == 180
    replay(1)


@pytest.mark.parametrize("blocks", [(), (2, 3)])
def test_one_pass_gives_the_losses_and_gradients_of_separate_ones(make_decoder, blocks):
    decoder = make_decoder(scale=0.05, blocks=blocks).requires_grad_(True)
    generator = torch_generator(0)
    resid = torch.randn(12, 64, generator=generator)
    text = ReplayBatch(
        decoder.frozen.sae.encode(resid),
        torch.randn(12, 64, generator=generator),
        torch.arange(2).repeat_interleave(6),
        torch.arange(1, 7).repeat(2),
    )
    together = text_losses(decoder, text, LogitBuffers(5), entropy=True)
    place = (text.latents, text.seq_id, text.pos)
    kl = chunked_kl_ce(hidden_of_rows(decoder, *place), text.frozen_hidden, decoder.frozen.lm).loss
    used = decoder.along(text.latents, slopes_of_choices(decoder, *place))
    apart = (kl.mean(), core.contribution_entropy(used).mean())
    gradients = []
    for found in (together, apart):
        decoder.zero_grad()
        (0.7 * found[0] + 2.0 * found[1]).backward()
        gradients.append({name: p.grad.clone() for name, p in decoder.named_parameters()})
    torch.testing.assert_close(together, apart)
    assert len(gradients[0]) > (2 if blocks else 1)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    kl, nothing = text_losses(decoder, text, LogitBuffers(5), entropy=False)
    assert nothing is None
    torch.testing.assert_close(kl, together[0])
