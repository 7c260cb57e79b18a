"""The mathematics of PPO, pure: tensors in, tensors out.

Axes: B rollout, T response token, V vocabulary. Responses are padded on the right; `mask` [B, T]
is 1 on response tokens (the end token included) and 0 on padding, and whatever lies under a 0 is
never read. All formulas are in docs/metrics.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class Gae(NamedTuple):
    """Generalised advantage estimates."""

    advantages: Tensor
    """[B, T], not whitened; 0 on padding."""
    returns: Tensor
    """[B, T] advantages + values, the critic's targets; 0 on padding."""


def gae(
    rewards: Float[Tensor, "batch length"],
    values: Float[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
    *,
    gamma: float,
    lam: float,
    bootstrap: Float[Tensor, " batch"] | None = None,
) -> Gae:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    What follows a response's last token is worth 0, also when the response was cut off at the
    length limit: the limit is part of these tasks, and the answer is judged as it stands.
    Another rule for cut responses is given by `bootstrap`.

    Args:
        rewards: [B, T].
        values: [B, T] of the state in which each token was chosen.
        mask: [B, T], ones first.
        gamma: discount per token.
        lam: 0 is one-step TD, 1 is Monte Carlo.
        bootstrap: [B] value of the state after the last token; None means 0.
    """
    keep = mask.to(rewards.dtype)
    after = torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap.to(rewards.dtype)
    next_value, next_advantage = after, torch.zeros_like(after)
    columns = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        inside = keep[:, t].bool()
        # Padding must leave both carries untouched, so that the last token sees `after`.
        next_value = torch.where(inside, values[:, t], next_value)
        next_advantage = torch.where(inside, advantage, next_advantage)
        columns.append(torch.where(inside, advantage, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    returns = torch.where(keep.bool(), advantages + values, 0.0)
    return Gae(advantages, returns)


def mean_of_others(rewards: Float[Tensor, " batch"], size: int) -> Float[Tensor, " batch"]:
    """For each response [B] the mean reward of the same prompt's other responses: a baseline.

    The response itself has no part in it, so that taking it off changes no expected gradient
    (leave-one-out; Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

    Args:
        rewards: [B], the responses to one prompt one after the other.
        size: responses to a prompt; with 1 there are no others, and the baseline is 0.
    """
    groups = rewards.view(-1, size)
    return ((groups.sum(-1, keepdim=True) - groups) / max(1, size - 1)).view(-1)


def masked_mean(
    values: Float[Tensor, " *axes"], mask: Shaped[Tensor, " *axes"]
) -> Float[Tensor, ""]:
    """Mean over the positions where `mask` is 1; 0 when there are none."""
    inside = torch.where(mask.bool(), values, 0.0)
    return inside.sum() / mask.sum().clamp_min(1)


def masked_whiten(
    values: Float[Tensor, " *axes"], mask: Shaped[Tensor, " *axes"]
) -> Float[Tensor, " *axes"]:
    """Shift and scale to mean 0 and (population) variance 1 over the mask; 0 on padding."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return torch.where(mask.bool(), (values - mean) * torch.rsqrt(variance + 1e-8), 0.0)


class PolicyLoss(NamedTuple):
    """The clipped surrogate and what to watch beside it."""

    loss: Tensor
    """Scalar, to be minimised."""
    clip_fraction: Tensor
    """Share of tokens whose ratio left [1 - clip, 1 + clip]."""
    approx_kl: Tensor
    """k3 estimate of KL(old || new), nats per token."""


def ppo_policy_loss(
    logprobs: Float[Tensor, "batch length"],
    old_logprobs: Float[Tensor, "batch length"],
    advantages: Float[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
    *,
    clip_coef: float,
    per_response: bool = False,
) -> PolicyLoss:
    """The clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    The trainer takes this loss from TRL; this is the oracle its parity test compares with, and
    the source of the logged clip fraction and approximate KL. All arguments [B, T].

    Args:
        per_response: the mean over responses of each one's mean (Shao et al. 2024, arXiv
            2402.03300, eq. 3) instead of the mean over all tokens.
    """
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    surrogate = torch.min(ratio * advantages, clipped * advantages)
    if per_response:
        loss = -((surrogate * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    else:
        loss = -masked_mean(surrogate, mask)
    with torch.no_grad():
        fraction = masked_mean(((ratio - 1).abs() > clip_coef).float(), mask)
        approx_kl = masked_mean(k3(old_logprobs, logprobs), mask)
    return PolicyLoss(loss, fraction, approx_kl)


def ppo_value_loss(
    values: Float[Tensor, "batch length"],
    old_values: Float[Tensor, "batch length"],
    returns: Float[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
    *,
    clip_coef: float,
) -> Float[Tensor, ""]:
    """Half the squared error, values kept within `clip_coef` of the old ones (pessimistic max).

    Values and returns are in normalised units (see `ReturnNormaliser`). All arguments [B, T].
    """
    near = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    worst = torch.max((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * masked_mean(worst, mask)


def k1(
    logprobs: Float[Tensor, " *axes"], ref_logprobs: Float[Tensor, " *axes"]
) -> Float[Tensor, " *axes"]:
    """log pi(a) - log ref(a): the unbiased estimator of KL(pi || ref) for a ~ pi, for rewards."""
    return logprobs - ref_logprobs


def k3(
    logprobs: Float[Tensor, " *axes"], ref_logprobs: Float[Tensor, " *axes"]
) -> Float[Tensor, " *axes"]:
    """exp(-k1) - 1 + k1: unbiased and >= 0, for display only.

    In a reward it steers to a wrong optimum, and as a loss its gradient is that of the reverse
    KL (Schulman 2020, joschu.net/blog/kl-approx.html; see docs/rl.md).
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - 1 - difference


def exact_kl(
    logprobs: Float[Tensor, "*places vocab"], other_logprobs: Float[Tensor, "*places vocab"]
) -> Float[Tensor, " *places"]:
    """KL(first || second) in nats [...] from normalised log-probabilities [..., V]."""
    return (logprobs.exp() * (logprobs - other_logprobs)).sum(-1)


def entropy(logprobs: Float[Tensor, "*places vocab"]) -> Float[Tensor, " *places"]:
    """Entropy in nats [...] of normalised log-probabilities [..., V]."""
    return -(logprobs.exp() * logprobs).sum(-1)


def contribution_entropy(
    contributions: Float[Tensor, "*places active"],
) -> Float[Tensor, " *places"]:
    """How evenly the latents of a token share its prediction: 0 (one latent) to 1 (all alike).

    Entropy of |contribution| normalised to sum 1, divided by log K. Differentiable; where all
    contributions are 0 the entropy is 0.

    Args:
        contributions: [..., K], signed: activation x decoder row . unembedding of the token.
    """
    return _share_entropy(contributions) / math.log(max(2, contributions.shape[-1]))


def effective_latents(contributions: Float[Tensor, "*places active"]) -> Float[Tensor, " *places"]:
    """exp(entropy) of the normalised |contributions| [..., K]: 1 to K latents, in effect."""
    return _share_entropy(contributions).exp()


def share_consistency(
    contributions: Float[Tensor, "tokens active"],
    latents: Int[Tensor, "tokens active"],
    token_ids: Int[Tensor, " tokens"],
) -> Float[Tensor, " tokens"]:
    """How alike the latents are that carry equal tokens: [N], 0 (never the same) to 1 (always).

    Cosine of |contribution| normalised to sum 1 with the sum of the same over all other rows of
    the token; rows whose token no other row has get the mean of those that have, or 0.

    Args:
        contributions: [N, K], signed.
        latents: [N, K] int64; one latent at most once a row (padding has contribution 0).
        token_ids: [N]
    """
    size = contributions.double().abs()
    share = size / size.sum(-1, keepdim=True).clamp_min(1e-12)
    _, group, count = token_ids.unique(return_inverse=True, return_counts=True)
    # One cell a (token, latent) pair that occurs: no [tokens, all latents] matrix.
    width = int(latents.max()) + 1 if latents.numel() else 1
    cells, place = (group[:, None] * width + latents).unique(return_inverse=True)
    total = share.new_zeros(len(cells)).index_add(0, place.flatten(), share.flatten())
    norm = share.new_zeros(len(count)).index_add(0, cells // width, total.square())[group]
    own = share.square().sum(-1)
    with_total = (share * total[place]).sum(-1)
    others = (norm - 2 * with_total + own).clamp_min(0).sqrt()
    cosine = (with_total - own) / (own.sqrt() * others).clamp_min(1e-12)
    known = count[group] > 1
    usual = cosine[known].mean() if bool(known.any()) else cosine.new_zeros(())
    return torch.where(known, cosine, usual).clamp(0, 1).to(contributions.dtype)


def _share_entropy(contributions: Tensor) -> Tensor:
    size = contributions.abs()
    share = size / size.sum(-1, keepdim=True).clamp_min(1e-12)
    # xlogy(0, 0) = 0, but its gradient is infinite there: padding latents would poison W.
    return -(share * share.clamp_min(1e-12).log()).sum(-1)


def linear_schedule(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Learning-rate factor: linear 0 -> 1 over the warm-up, then linear to 0 at `total_steps`.

    The first step has 1 / warmup_steps, not 0. A warm-up longer than a tenth of the training is
    cut to that tenth, so that short runs of a long plan still learn.
    """
    warmup = min(warmup_steps, max(1, total_steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


class RewardWeights(NamedTuple):
    """Weights of the composite reward (and of the differentiable losses of the same name)."""

    faithfulness: float
    monosemanticity: float
    task: float


def adapt_weights(
    weights: RewardWeights,
    *,
    kl: float,
    num_effective_latents: float,
    kl_target: float,
    latents_target: float,
    faithfulness_factor: float,
    monosemanticity_factor: float,
) -> RewardWeights:
    """The plan's adaptive rule, applied at each evaluation.

    Faithfulness is weighed less once held-out KL is below its target, monosemanticity more while
    more latents carry a prediction than wanted.
    """
    faithfulness, monosemanticity, task = weights
    if kl < kl_target:
        faithfulness *= faithfulness_factor
    if num_effective_latents > latents_target:
        monosemanticity *= monosemanticity_factor
    return RewardWeights(faithfulness, monosemanticity, task)


class ReturnNormaliser:
    """Running mean and standard deviation of returns, so that the critic learns unit targets.

    Without it the value loss reached 4 to 6 and its gradient drowned all else.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.sum_squares = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation of all returns seen, at least 1e-3; 1 before any."""
        return max(1e-3, math.sqrt(self.sum_squares / self.count)) if self.count else 1.0

    def update(
        self, returns: Float[Tensor, "batch length"], mask: Shaped[Tensor, "batch length"]
    ) -> None:
        """Add a rollout's returns [B, T] (Chan et al.'s parallel form of Welford's update)."""
        new = returns[mask.bool()].double()
        if new.numel() == 0:
            return
        count, mean = float(new.numel()), float(new.mean())
        squares = float(((new - mean) ** 2).sum())
        total = self.count + count
        shift = mean - self.mean
        self.sum_squares += squares + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def normalise(self, returns: Float[Tensor, " *axes"]) -> Float[Tensor, " *axes"]:
        """Returns in normalised units."""
        return (returns - self.mean) / self.std

    def denormalise(self, values: Float[Tensor, " *axes"]) -> Float[Tensor, " *axes"]:
        """Values in the units of the reward."""
        return values * self.std + self.mean

    def state(self) -> list[float]:
        """JSON form for checkpoints."""
        return [self.count, self.mean, self.sum_squares]

    def load_state(self, state: list[float]) -> None:
        """The inverse of `state`."""
        self.count, self.mean, self.sum_squares = (float(value) for value in state)


def explained_variance(
    values: Float[Tensor, "batch length"],
    returns: Float[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is perfect, 0 a constant."""
    keep = mask.bool()
    target = returns[keep]
    variance = float(target.var(unbiased=False)) if target.numel() else 0.0
    if variance == 0.0:
        return 0.0
    return 1.0 - float((target - values[keep]).var(unbiased=False)) / variance
