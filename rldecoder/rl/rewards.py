"""Rewards: small objects with one interface, and their weighted sum.

Every part depends on the action that was taken. The plan's `-KL(frozen || decoder)` at a state
does not, and as a reward it made held-out KL worse (docs/rl.md): here faithfulness is
`log p_frozen(a) - log pi(a)`, whose mean over a ~ pi is -KL(pi || frozen).

Rewards given at every token are divided by the response's length, so that a response collects
their mean: all weights then compare like with like, and no part pays for ending early.

Axes: B rollout, T response token, K active latents. Everything is 0 on padding.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rldecoder.rl.core import RewardWeights, contribution_entropy, k1, share_consistency
from rldecoder.seeds import torch_generator


class RewardInputs(NamedTuple):
    """What is known about a batch of rollouts when rewards are given."""

    step: int
    """PPO step, from 0."""
    logprobs: Tensor
    """[B, T] log pi(a) of the policy that sampled."""
    frozen_logprobs: Tensor
    """[B, T] log p(a) of the frozen model."""
    ref_logprobs: Tensor
    """[B, T] log p(a) of the supervised decoder that training started from."""
    contributions: Tensor
    """[B, T, K] of each active latent to the chosen token's logit."""
    latents: Tensor
    """[B, T, K] int64, which latents these are."""
    token_ids: Tensor
    """[B, T] the chosen tokens."""
    mask: Tensor
    """[B, T]"""
    task_scores: Tensor
    """[B] 0 or 1."""


class Reward(Protocol):
    """One part of the reward."""

    name: str

    def __call__(self, seen: RewardInputs) -> Float[Tensor, "batch length"]:
        """Rewards [B, T] per token, unweighted, 0 on padding."""
        ...


class FaithfulnessReward:
    """log p_frozen(a) - log pi(a), in nats, spread over the response."""

    name = "faithfulness"

    def __call__(self, seen: RewardInputs) -> Float[Tensor, "batch length"]:
        """[B, T]; a response's sum is the mean over its tokens."""
        return _spread(seen.frozen_logprobs - seen.logprobs, seen.mask)


class MonosemanticityReward:
    """1 - entropy of the latents' contributions to the chosen token: 1 when one latent does all.

    It is computed from what the decoder uses (activation x decoder row x token direction). The L0
    of a TopK dictionary is constant and could teach nothing.
    """

    name = "monosemanticity"

    def __call__(self, seen: RewardInputs) -> Float[Tensor, "batch length"]:
        """[B, T]; a response's sum is the mean over its tokens."""
        return _spread(1.0 - contribution_entropy(seen.contributions), seen.mask)


class ConsistencyReward:
    """How much a token is carried by the latents that carry it elsewhere: 0 to 1.

    The cosine of a choice's contribution shares with the summed shares of all other choices of the
    same token in the batch. Where a token is chosen once there is nothing to compare with: it gets
    the mean of the others, so that rare tokens neither gain nor lose.
    """

    name = "consistency"

    def __call__(self, seen: RewardInputs) -> Float[Tensor, "batch length"]:
        """[B, T]; a response's sum is the mean over its tokens."""
        keep = seen.mask.bool()
        found = share_consistency(
            seen.contributions[keep], seen.latents[keep], seen.token_ids[keep]
        )
        out = torch.zeros_like(seen.logprobs)
        out[keep] = found.to(out.dtype)
        return _spread(out, seen.mask)


class TaskReward:
    """The verifiable score, at the response's last token."""

    name = "task"

    def __call__(self, seen: RewardInputs) -> Float[Tensor, "batch length"]:
        """[B, T]"""
        return at_last_token(seen.task_scores.to(seen.logprobs.dtype), seen.mask)


class ReferenceKlReward:
    """Minus the k1 estimate of KL(pi || reference), in nats, spread over the response."""

    name = "kl_penalty"

    def __call__(self, seen: RewardInputs) -> Float[Tensor, "batch length"]:
        """[B, T]; a response's sum is the mean over its tokens."""
        return _spread(-k1(seen.logprobs, seen.ref_logprobs), seen.mask)


class RandomReward:
    """Standard normal noise at the last token, for the random-reward control."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, seen: RewardInputs) -> Float[Tensor, "batch length"]:
        """[B, T]; the same for the same seed and step."""
        generator = torch_generator(self.seed, "random-reward", seen.step)
        noise = torch.randn(len(seen.mask), generator=generator).to(seen.logprobs)
        return TaskReward()(seen._replace(task_scores=noise))


class WeightedReward(NamedTuple):
    """A reward part and what it counts."""

    weight: float
    reward: Reward


class Composite(NamedTuple):
    """The composite reward of a batch."""

    total: Tensor
    """[B, T]"""
    parts: dict[str, Tensor]
    """Name to [B]: each part's unweighted sum over the response."""


def compose(rewards: list[WeightedReward], seen: RewardInputs) -> Composite:
    """The weighted sum of all parts, and each part by itself."""
    total = torch.zeros_like(seen.logprobs)
    parts = {}
    for weight, reward in rewards:
        part = reward(seen)
        total = total + weight * part
        parts[reward.name] = part.sum(-1)
    return Composite(total, parts)


def decoder_rewards(
    weights: RewardWeights, kl_penalty: float, consistency: float
) -> list[WeightedReward]:
    """The plan's composite: faithfulness, monosemanticity, task, minus the KL penalty.

    Args:
        weights: of the three.
        kl_penalty: weight of the pull towards the start.
        consistency: share of monosemanticity's weight that is consistency's; the rest is
            sparsity's.
    """
    return [
        WeightedReward(weights.faithfulness, FaithfulnessReward()),
        WeightedReward(weights.monosemanticity * (1 - consistency), MonosemanticityReward()),
        WeightedReward(weights.monosemanticity * consistency, ConsistencyReward()),
        WeightedReward(weights.task, TaskReward()),
        WeightedReward(kl_penalty, ReferenceKlReward()),
    ]


def at_last_token(
    values: Float[Tensor, " batch"], mask: Shaped[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    """Values [B] at each response's last token, [B, T]; 0 elsewhere."""
    last = mask * (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    return last.to(values.dtype) * values[:, None]


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Divide per-token values by the response's number of tokens; 0 on padding."""
    length = mask.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(mask.bool(), values, 0.0) / length
