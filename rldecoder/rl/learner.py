"""What PPO trains, what it is told to do, and what each of its steps reports."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rldecoder.config.rl import PpoSettings
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.rl import core
from rldecoder.rl.critic import Critic
from rldecoder.rl.replay import ReplayBatch
from rldecoder.rl.rewards import Composite, RewardInputs, WeightedReward
from rldecoder.rl.rollout import Rollout
from rldecoder.sae.model import SparseLatents

ResponseLoss = Literal["forward_kl", "reverse_kl", "gold", "right"]
"""What the differentiable loss on responses is: KL(frozen || decoder), KL(decoder || frozen), the
cross-entropy of the responses themselves, which are then gold answers, or of those of them alone
that are wholly right: the others add nothing, to no loss."""


class PpoStep(NamedTuple):
    """What one PPO step (a batch of rollouts and its inner epochs) did."""

    step: int
    """From 0."""
    rollout: Rollout
    rewards: Composite
    task_scores: Tensor
    """[B]"""
    metrics: dict[str, float]
    """Means over the step; names as in docs/metrics.md."""


class StepData(NamedTuple):
    """What all updates of a PPO step, and the report on it, read.

    Axes: B rollout and T response token, padded, rows in the order of the prompts; or N response
    tokens of all rollouts, row after row, padding left out.
    """

    rollout: Rollout
    seen: RewardInputs
    """What rewards were given on: the old log-probabilities, contributions, task scores."""
    rewards: Composite
    advantages: Tensor
    """[B, T] whitened, times `policy_coef`."""
    values: Tensor
    """[B, T] of the critic before the step, normalised."""
    returns: Tensor
    """[B, T] normalised."""
    row: Tensor
    """[N] the rollout that each token belongs to."""
    token_ids: Tensor
    """[N]"""
    latents: SparseLatents
    """[N, K]"""
    states: Tensor
    """[N, D] what the SAE reads the latents as; the critic's input."""
    slopes: Tensor
    """[N, D] along which latents contribute to the chosen logit (`rldecoder.rl.states`)."""
    frozen_logprobs: Tensor | None
    """[N, V] of the frozen model; None where no loss or reward needs them."""
    kl_factors: Tensor
    """[B] of the loss on responses, by task."""
    counts: Tensor | None
    """[N] bool: tokens that the losses on responses are means over; None: all."""
    entropy: float
    """Of the policy that sampled, nats per token."""
    value_explained_variance: float
    """Of the returns, by the old values."""


class PolicyNow(NamedTuple):
    """The policy in the present update, [b, T] with rows as TRL has them; 0 on padding."""

    logprobs: Tensor
    entropy: Tensor


class Learner(NamedTuple):
    """Everything that training changes, and the fixed reference beside it."""

    decoder: SaeDecoderForCausalLM
    critic: Critic
    optimizer: torch.optim.Optimizer
    """Parameter groups: the map from latents, the blocks if any, the critic. `peak` is the rate."""
    normaliser: core.ReturnNormaliser
    reference: SaeDecoderForCausalLM
    """The supervised decoder that training started from."""


def make_learner(decoder: SaeDecoderForCausalLM, settings: PpoSettings, seed: int) -> Learner:
    """A decoder with a fresh critic and optimiser; its present weights become the reference."""
    critic = Critic(decoder.config.d_model, settings.critic_width, seed).to(decoder.device)
    reference = copy.deepcopy(decoder).requires_grad_(False).eval()
    decoder.requires_grad_(True)
    groups = [_group([decoder.W, decoder.b], settings.lr) | {"eps": settings.adam_eps}]
    if blocks := list(decoder.upper.parameters()):
        groups.append(_group(blocks, settings.blocks_lr))
    # Normalised returns have mean 0, so the output bias sees gradients of pure rounding noise,
    # which Adam's default eps of 1e-8 would turn into full steps.
    groups.append(_group(critic.parameters(), settings.critic_lr) | {"eps": 1e-5})
    optimizer = torch.optim.Adam(groups)
    return Learner(decoder, critic, optimizer, core.ReturnNormaliser(), reference)


@torch.no_grad()
def interpolate(learner: Learner, end: Iterable[Tensor], share: float) -> None:
    """Move the decoder onto the line from its reference (share 0) to the weights `end` (1).

    Interpolation with the start of fine-tuning: Wortsman et al. 2022 (arXiv 2109.01903); of
    policies with the one they were regularised to: Rame et al. 2024 (arXiv 2406.16768).
    """
    starts = learner.reference.parameters()
    for parameter, start, last in zip(learner.decoder.parameters(), starts, end, strict=True):
        parameter.copy_(start.lerp(last, share))


def choose_share(
    learner: Learner,
    shares: Sequence[float],
    max_rise: float,
    kl: Callable[[SaeDecoderForCausalLM], float],
) -> float:
    """`interpolate` to the largest share whose KL is within a bound, or to that of least KL.

    Args:
        learner: its decoder is moved.
        shares: candidates.
        max_rise: nats per token that KL may lie above the reference's.
        kl: KL(frozen || decoder) on held-out text; not asked for where there is no choice.
    """
    end = [parameter.detach().clone() for parameter in learner.decoder.parameters()]
    if len(shares) == 1:
        interpolate(learner, end, shares[0])
        return shares[0]
    limit = kl(learner.reference) + max_rise
    measured = {}
    for share in sorted(shares, reverse=True):
        interpolate(learner, end, share)
        measured[share] = kl(learner.decoder)
        if measured[share] <= limit:
            return share
    best = min(measured, key=measured.__getitem__)
    interpolate(learner, end, best)
    return best


def _group(parameters: Iterable[nn.Parameter], peak: float) -> dict[str, Any]:
    return {"params": list(parameters), "lr": peak, "peak": peak}


class Plan(NamedTuple):
    """What a trainer is told to do."""

    settings: PpoSettings
    prompts: Sequence[TaskPrompt]
    """`batch_size` prompts for each of the `total_steps`, in order."""
    total_steps: int
    """PPO steps of the whole training; the schedule of the learning rate spans them."""
    rewards: Callable[[], list[WeightedReward]]
    """The reward of the present step (weights change between stages and evaluations)."""
    loss_weights: Callable[[], core.RewardWeights]
    """Present weights of the differentiable losses."""
    replay: Callable[[int], ReplayBatch] | None
    """Text tokens for an optimiser step (from 0; every update has its own), or None."""
    after_step: Callable[[PpoStep], bool]
    """Called at each rollout boundary, when exact resume is possible; True stops training."""
    seed: int
    output_dir: Path
    """TRL insists on one; nothing is written there."""
    response_loss: ResponseLoss = "forward_kl"
    """The loss on responses, weighted as faithfulness is and by `response_kl_factors`."""
