"""What training starts from."""

from __future__ import annotations

import pytest
import torch

from rldecoder.config.rl import PpoSettings
from rldecoder.rl.learner import choose_share, make_learner


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


@pytest.mark.parametrize(
    ("rise", "chosen", "asked"),
    [
        (-0.5, 0.75, [0.0, 1.0, 0.75]),
        (1.0, 1.0, [0.0, 1.0]),
        (-9.0, 0.5, [0.0, 1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_the_largest_share_within_the_bound_is_taken_or_the_best(make_decoder, rise, chosen, asked):
    """KL is a parabola around share 0.5 here: 8 at 0 and 1, 2 at 0.25 and 0.75, 0 at 0.5."""
    decoder = make_decoder()
    learner = make_learner(decoder, PpoSettings(), seed=0)
    start = decoder.W.detach().clone()
    with torch.no_grad():
        decoder.W.add_(1.0)
    seen = []

    def kl(one):
        seen.append(float((one.W.detach() - start).mean()))
        return 32 * (seen[-1] - 0.5) ** 2

    assert choose_share(learner, (0.25, 0.5, 0.75, 1.0), rise, kl) == chosen
    assert seen == pytest.approx(asked, abs=1e-5)
    torch.testing.assert_close(decoder.W, start + chosen)


def test_one_share_is_taken_unasked(make_decoder):
    learner = make_learner(make_decoder(), PpoSettings(), seed=0)
    share = choose_share(learner, (0.5,), 0.0, lambda decoder: pytest.fail("KL was asked for"))
    assert share == 0.5
