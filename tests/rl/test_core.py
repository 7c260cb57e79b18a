"""PPO's mathematics against brute force, closed forms and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rldecoder.rl import core
from rldecoder.seeds import torch_generator


def ragged(seed: int, batch: int = 4, length: int = 7) -> tuple[torch.Tensor, ...]:
    """Rewards, values [B, T] and a right-padded mask, with garbage under the padding."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(batch, length, generator=generator, dtype=torch.float64)
    values = torch.randn(batch, length, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    mask = (torch.arange(length)[None] < lengths).long()
    rewards[mask == 0], values[mask == 0] = 1e6, -1e6
    return rewards, values, mask


def brute_force_gae(rewards, values, mask, gamma, lam, bootstrap):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, summed as it is written."""
    out = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        n = int(mask[b].sum())
        after = [*values[b, 1:n].tolist(), float(bootstrap[b])]
        delta = [float(rewards[b, t]) + gamma * after[t] - float(values[b, t]) for t in range(n)]
        for t in range(n):
            out[b, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gamma=st.floats(0.0, 1.0),
    lam=st.floats(0.0, 1.0),
    bootstrapped=st.booleans(),
)
def test_gae_equals_brute_force(seed, gamma, lam, bootstrapped):
    rewards, values, mask = ragged(seed)
    bootstrap = torch.arange(4.0, dtype=torch.float64) if bootstrapped else torch.zeros(4)
    found = core.gae(
        rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap if bootstrapped else None
    )
    expected = brute_force_gae(rewards, values, mask, gamma, lam, bootstrap)
    torch.testing.assert_close(found.advantages, expected)
    torch.testing.assert_close(found.returns, (expected + values) * mask)


def test_gae_does_not_depend_on_padding():
    rewards, values, mask = ragged(3)
    short = core.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    pad = torch.full((4, 5), 123.0, dtype=torch.float64)
    wide = core.gae(
        torch.cat([rewards, pad], 1),
        torch.cat([values, pad], 1),
        torch.cat([mask, torch.zeros(4, 5, dtype=torch.long)], 1),
        gamma=0.9,
        lam=0.8,
    )
    torch.testing.assert_close(wide.advantages[:, :7], short.advantages)
    assert (wide.advantages[:, 7:] == 0).all()


def test_gae_with_lambda_one_is_monte_carlo():
    rewards, values, mask = ragged(5)
    found = core.gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for b in range(4):
        n = int(mask[b].sum())
        for t in range(n):
            discounted = sum(0.9 ** (s - t) * float(rewards[b, s]) for s in range(t, n))
            assert float(found.returns[b, t]) == pytest.approx(discounted)


def test_cut_responses_are_worth_nothing_after_their_end_unless_told_otherwise():
    rewards, values = torch.zeros(1, 2), torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.long)
    assert (core.gae(rewards, values, mask, gamma=1.0, lam=1.0).advantages == 0).all()
    found = core.gae(rewards, values, mask, gamma=0.5, lam=1.0, bootstrap=torch.tensor([8.0]))
    torch.testing.assert_close(found.advantages, torch.tensor([[2.0, 4.0]]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_baseline_is_the_mean_of_the_other_responses(size):
    rewards = torch.randn(8, generator=torch_generator(0, "rewards"))
    for row, found in enumerate(core.mean_of_others(rewards, size)):
        first = row // size * size
        others = [float(rewards[i]) for i in range(first, first + size) if i != row]
        assert float(found) == pytest.approx(sum(others) / max(1, len(others)), abs=1e-6)


def test_whitening_sees_only_the_mask():
    values, mask = torch.randn(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, 2:] = 0
    values[0, 2:] = 1e9
    white = core.masked_whiten(values, mask)
    inside = white[mask.bool()]
    assert float(inside.mean()) == pytest.approx(0, abs=1e-6)
    assert float(inside.var(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert (white[mask == 0] == 0).all()


def test_policy_loss_clips_only_in_the_pessimistic_direction():
    old = torch.zeros(1, 4)
    new = torch.log(torch.tensor([[1.5, 1.5, 0.5, 0.5]])).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    found = core.ppo_policy_loss(new, old, advantages, torch.ones(1, 4), clip_coef=0.2)
    assert float(found.loss.detach()) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    found.loss.backward()
    assert ((new.grad == 0) == torch.tensor([[True, False, False, True]])).all()
    assert float(found.clip_fraction) == 1.0


def test_ratio_one_gives_the_policy_gradient():
    logprobs = torch.randn(2, 3, requires_grad=True)
    advantages = torch.randn(2, 3)
    loss = core.ppo_policy_loss(
        logprobs, logprobs.detach(), advantages, torch.ones(2, 3), clip_coef=0.2
    )
    assert float(loss.clip_fraction) == 0.0
    assert float(loss.approx_kl) == pytest.approx(0.0, abs=1e-7)
    loss.loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages / 6)


def test_per_response_short_answers_count_as_much_as_long_ones():
    logprobs, mask = torch.zeros(2, 4), torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    advantages = torch.tensor([[1.0, 2, 3, 6], [-8, 9, 9, 9]])
    by_token = core.ppo_policy_loss(logprobs, logprobs, advantages, mask, clip_coef=0.2)
    by_response = core.ppo_policy_loss(
        logprobs, logprobs, advantages, mask, clip_coef=0.2, per_response=True
    )
    assert float(by_token.loss) == pytest.approx(-(1 + 2 + 3 + 6 - 8) / 5)
    assert float(by_response.loss) == pytest.approx(-(3 - 8) / 2)


def test_value_loss_is_pessimistic():
    old, returns, mask = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    near = core.ppo_value_loss(torch.full((1, 1), 0.9), old, returns, mask, clip_coef=0.2)
    # the clipped value 0.2 is farther from 1 than 0.9 is, so it counts
    assert float(near) == pytest.approx(0.5 * 0.8**2)


def test_kl_estimators_estimate_kl():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, generator=generator).log_softmax(-1)
    q = torch.randn(5, generator=generator).log_softmax(-1)
    exact = float(core.exact_kl(p, q))
    assert exact == pytest.approx(float((p.exp() * (p - q)).sum()))
    # Over everything that p can draw, not over a sample: k1 and k3 are unbiased.
    for estimator in (core.k1, core.k3):
        expectation = float((p.exp() * estimator(p, q)).sum())
        assert expectation == pytest.approx(exact, abs=1e-6)
    assert (core.k3(p, q) >= 0).all()
    assert (core.k1(p, q) < 0).any()


def test_entropy_of_a_uniform_distribution():
    assert float(core.entropy(torch.zeros(8).log_softmax(-1))) == pytest.approx(math.log(8))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.1, 10))
def test_contribution_entropy_is_scale_free_and_bounded(values, scale):
    contributions = torch.tensor(values, dtype=torch.float64)
    found = float(core.contribution_entropy(contributions))
    assert -1e-9 <= found <= 1 + 1e-9
    if float(contributions.abs().sum()) > 1e-6:
        again = float(core.contribution_entropy(scale * contributions))
        assert again == pytest.approx(found, abs=1e-6)


def test_effective_latents_counts_equal_contributions():
    contributions = torch.tensor([[1.0, -1.0, 1.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    effective = core.effective_latents(contributions)
    torch.testing.assert_close(effective, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(
        core.contribution_entropy(contributions), torch.tensor([math.log(3) / math.log(4), 0.0])
    )


def test_contribution_entropy_has_a_finite_gradient_at_zero():
    contributions = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    core.contribution_entropy(contributions).sum().backward()
    assert torch.isfinite(contributions.grad).all()


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 4))
def test_share_consistency_is_the_definition(seed, rows, tokens):
    """Against dense shares and a loop; a latent that is padded in has contribution 0."""
    rng = np.random.default_rng(seed)
    active, num_latents = 3, 7
    latents = np.stack([rng.choice(num_latents, active, replace=False) for _ in range(rows)])
    used = rng.normal(size=(rows, active)) * (rng.random((rows, active)) < 0.8)
    ids = rng.integers(0, tokens, rows)
    shares = np.zeros((rows, num_latents))
    for row in range(rows):
        shares[row, latents[row]] = np.abs(used[row]) / max(np.abs(used[row]).sum(), 1e-12)
    expected = np.full(rows, np.nan)
    for row in range(rows):
        others = [other for other in range(rows) if other != row and ids[other] == ids[row]]
        if others:
            total = shares[others].sum(0)
            sizes = np.linalg.norm(shares[row]) * np.linalg.norm(total)
            expected[row] = shares[row] @ total / sizes if sizes else 0.0
    usual = 0.0 if np.isnan(expected).all() else np.nanmean(expected)
    found = core.share_consistency(*(torch.from_numpy(x) for x in (used, latents, ids)))
    np.testing.assert_allclose(found, np.where(np.isnan(expected), usual, expected), atol=1e-6)


def test_consistency_pays_for_equal_latents_only():
    same = torch.tensor([[0, 1], [1, 0]])
    apart = torch.tensor([[0, 1], [2, 3]])
    used, ids = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([4, 4])
    assert core.share_consistency(used, same, ids).tolist() == pytest.approx([1.0, 1.0])
    assert core.share_consistency(used, apart, ids).tolist() == [0.0, 0.0]
    assert core.share_consistency(used, same, torch.tensor([4, 5])).tolist() == [0.0, 0.0]
    assert core.share_consistency(used[:0], same[:0], ids[:0]).tolist() == []


def test_linear_schedule():
    factors = [core.linear_schedule(s, warmup_steps=5, total_steps=100) for s in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[100] == 0.0
    assert max(factors) == 1.0
    assert np.diff(factors[5:]).max() < 0
    short = [core.linear_schedule(s, warmup_steps=500, total_steps=20) for s in range(20)]
    assert short[1] == 1.0
    assert min(short) > 0


def test_adaptive_rule():
    weights = core.RewardWeights(0.5, 0.3, 0.2)
    rule = {
        "kl_target": 0.5,
        "latents_target": 120.0,
        "faithfulness_factor": 0.95,
        "monosemanticity_factor": 1.1,
    }
    same = core.adapt_weights(weights, kl=0.5, num_effective_latents=120, **rule)
    assert same == weights
    moved = core.adapt_weights(weights, kl=0.4, num_effective_latents=121, **rule)
    assert moved == pytest.approx((0.475, 0.33, 0.2))


def test_return_normaliser_equals_the_pooled_moments():
    normaliser = core.ReturnNormaliser()
    assert normaliser.std == 1.0
    seen = []
    for seed in range(4):
        returns, _, mask = ragged(seed)
        normaliser.update(returns, mask)
        seen += returns[mask.bool()].tolist()
    assert normaliser.mean == pytest.approx(np.mean(seen))
    assert normaliser.std == pytest.approx(np.std(seen))
    values = torch.randn(5)
    torch.testing.assert_close(normaliser.denormalise(normaliser.normalise(values)), values)
    copy = core.ReturnNormaliser()
    copy.load_state(normaliser.state())
    assert (copy.mean, copy.std) == (normaliser.mean, normaliser.std)


def test_explained_variance():
    returns, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.long)
    assert core.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert core.explained_variance(torch.zeros(3, 4), returns, mask) == pytest.approx(0.0, abs=1e-6)
    assert core.explained_variance(returns, torch.ones(3, 4), mask) == 0.0
