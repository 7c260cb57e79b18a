"""What training starts from."""

from __future__ import annotations

import torch

from rldecoder.config.rl import PpoSettings
from rldecoder.rl.learner import make_learner


def test_two_groups_and_a_reference_of_its_own(make_decoder):
    decoder = make_decoder()
    decoder.requires_grad_(False)
    learner = make_learner(decoder, PpoSettings(lr=1e-4, adam_eps=1e-6, critic_lr=1e-2), seed=0)
    policy, critic = learner.optimizer.param_groups
    assert [id(p) for p in policy["params"]] == [id(decoder.W), id(decoder.b)]
    assert (policy["lr"], critic["lr"]) == (1e-4, 1e-2)
    assert (policy["eps"], critic["eps"]) == (1e-6, 1e-5)
    assert decoder.W.requires_grad
    assert {id(p) for p in critic["params"]} == {id(p) for p in learner.critic.parameters()}
    with torch.no_grad():
        decoder.W.add_(1.0)
    assert not torch.equal(learner.reference.W, decoder.W)
    assert not learner.reference.W.requires_grad
