"""Each reward part by hand, and that the action matters."""

from __future__ import annotations

import math

import pytest
import torch

from rldecoder.rl.core import RewardWeights
from rldecoder.rl.rewards import (
    ConsistencyReward,
    FaithfulnessReward,
    MonosemanticityReward,
    RandomReward,
    ReferenceKlReward,
    RewardInputs,
    TaskReward,
    compose,
    decoder_rewards,
)


@pytest.fixture
def seen() -> RewardInputs:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    garbage = torch.full((2, 3), 99.0)
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    contributions = torch.zeros(2, 3, 4)
    contributions[0, :2, 0] = 1.0
    contributions[1] = 1.0
    return RewardInputs(
        step=0,
        logprobs=torch.where(mask.bool(), logprobs, garbage),
        frozen_logprobs=torch.where(mask.bool(), logprobs + 0.5, -garbage),
        ref_logprobs=torch.where(mask.bool(), logprobs - 0.25, -garbage),
        contributions=contributions,
        latents=torch.arange(4).expand(2, 3, 4),
        token_ids=torch.tensor([[5, 6, 0], [5, 7, 7]]),
        mask=mask,
        task_scores=torch.tensor([1.0, 0.0]),
    )


def test_a_response_collects_the_mean_over_its_tokens(seen):
    torch.testing.assert_close(FaithfulnessReward()(seen).sum(-1), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(ReferenceKlReward()(seen).sum(-1), torch.tensor([-0.25, -0.25]))
    # one latent does everything in row 0, four share alike in row 1
    torch.testing.assert_close(MonosemanticityReward()(seen).sum(-1), torch.tensor([1.0, 0.0]))
    # token 5: one latent and four alike, cosine 1/2; token 7: alike; token 6: the others' mean
    by_hand = torch.tensor([(0.5 + 0.75) / 2, (0.5 + 1 + 1) / 3])
    torch.testing.assert_close(ConsistencyReward()(seen).sum(-1), by_hand)


def test_padding_gets_nothing(seen):
    for reward in (
        FaithfulnessReward(), MonosemanticityReward(), ConsistencyReward(), TaskReward(),
        ReferenceKlReward(),
    ):  # fmt: skip
        assert float(reward(seen)[0, 2]) == 0.0


def test_task_score_arrives_at_the_last_token(seen):
    torch.testing.assert_close(TaskReward()(seen), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_composite_is_the_weighted_sum(seen):
    weights = RewardWeights(0.5, 0.3, 0.2)
    found = compose(decoder_rewards(weights, kl_penalty=0.1, consistency=0.25), seen)
    assert set(found.parts) == {
        "faithfulness", "monosemanticity", "consistency", "task", "kl_penalty",
    }  # fmt: skip
    used = 0.75 * 1.0 + 0.25 * 0.625
    expected = 0.5 * 0.5 + 0.3 * used + 0.2 * 1.0 + 0.1 * -0.25
    assert float(found.total[0].sum()) == pytest.approx(expected)


def test_faithfulness_depends_on_the_action():
    """The plan's -KL(s) gives two actions in one state the same reward; ours must not."""
    frozen, policy = [0.7, 0.2, 0.1], [0.1, 0.2, 0.7]
    # One rollout an action, of two tokens: the action in question, then the second one again.
    rewards = FaithfulnessReward()(
        RewardInputs(
            step=0,
            logprobs=torch.tensor([[p, policy[1]] for p in policy]).log(),
            frozen_logprobs=torch.tensor([[q, frozen[1]] for q in frozen]).log(),
            ref_logprobs=torch.zeros(3, 2),
            contributions=torch.ones(3, 2, 4),
            latents=torch.zeros(3, 2, 4, dtype=torch.long),
            token_ids=torch.zeros(3, 2, dtype=torch.long),
            mask=torch.ones(3, 2, dtype=torch.long),
            task_scores=torch.zeros(3),
        )
    )
    first = rewards[:, 0].tolist()
    assert first == pytest.approx(
        [math.log(q / p) / 2 for q, p in zip(frozen, policy, strict=True)]
    )
    assert first[0] > 0 > first[2]
    assert rewards[:, 1].tolist() == pytest.approx([0.0] * 3)
    kl = sum(p * math.log(p / q) for q, p in zip(frozen, policy, strict=True))
    expected = sum(p * reward for p, reward in zip(policy, first, strict=True))
    assert expected == pytest.approx(-kl / 2)


def test_random_reward_is_noise_that_resume_repeats(seen):
    reward = RandomReward(seed=3)
    assert torch.equal(reward(seen), RandomReward(seed=3)(seen))
    assert not torch.equal(reward(seen), reward(seen._replace(step=1)))
    many = seen._replace(
        mask=torch.ones(4000, 1, dtype=torch.long),
        logprobs=torch.zeros(4000, 1),
        task_scores=torch.ones(4000),
    )
    noise = reward(many)
    assert float(noise.mean()) == pytest.approx(0.0, abs=4 / math.sqrt(4000))
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)
