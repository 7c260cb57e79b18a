"""The critic: zero at the start, deaf to the policy."""

from __future__ import annotations

import torch

from rldecoder.rl.critic import Critic


def test_starts_at_zero_and_is_seeded():
    states = torch.randn(3, 2, 8)
    critic = Critic(8, 4, seed=0)
    assert (critic(states) == 0).all()
    assert torch.equal(critic.hidden_weight, Critic(8, 4, seed=0).hidden_weight)
    assert not torch.equal(critic.hidden_weight, Critic(8, 4, seed=1).hidden_weight)


def test_no_gradient_reaches_the_states():
    states = torch.randn(3, 8, requires_grad=True)
    critic = Critic(8, 4, seed=0)
    with torch.no_grad():
        critic.out_weight.fill_(1.0)
    critic(states).sum().backward()
    assert states.grad is None
    assert critic.hidden_weight.grad.abs().sum() > 0


def test_fits_a_simple_target():
    torch.manual_seed(0)
    states = torch.randn(256, 8)
    target = states[:, 0] - states[:, 1]
    critic = Critic(8, 32, seed=0)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = ((critic(states) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2 * float(target.var())
