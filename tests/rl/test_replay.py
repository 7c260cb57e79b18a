"""Replay batches depend on the step only."""

from __future__ import annotations

import torch

from rldecoder.rl.replay import Replay
from rldecoder.sae.model import Sae, SaeSpec


def test_any_step_gives_the_same_batch_as_an_undisturbed_run(tiny_cache):
    sae = Sae.random_init(SaeSpec(d_model=64, num_latents=96, k=16, hook_layer=2), seed=1)
    straight = Replay(tiny_cache, sae, num_tokens=50, seed=3)
    assert straight.reader.batches_per_epoch(50) == 3  # so that steps 3 and 6 begin new epochs
    batches = [straight(step) for step in range(8)]
    for start in (0, 2, 3, 7):
        resumed = Replay(tiny_cache, sae, num_tokens=50, seed=3)
        for step in range(start, 8):
            again = resumed(step)
            assert torch.equal(again.frozen_hidden, batches[step].frozen_hidden)
            assert torch.equal(again.latents.acts, batches[step].latents.acts)
    assert not torch.equal(batches[0].frozen_hidden, batches[3].frozen_hidden)


def test_a_small_split_gives_what_it_has(tiny_cache):
    sae = Sae.random_init(SaeSpec(d_model=64, num_latents=96, k=16, hook_layer=2), seed=1)
    replay = Replay(tiny_cache, sae, num_tokens=10_000, seed=0)
    assert len(replay(0).frozen_hidden) == replay.reader.num_tokens == 180
    replay(1)
