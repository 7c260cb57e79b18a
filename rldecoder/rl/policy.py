"""What PPO needs of the policy at each response token, through the frozen unembedding.

Log-probability of the chosen token, entropy, and KL(frozen || decoder) are functions of the same
logits z = U h / temperature. With p = softmax(z), q the frozen distribution and a the token:

    d log p(a) / dz = onehot(a) - p      d H / dz = -p (log p + H)      d KL(q || p) / dz = p - q

so one buffer of logits serves all three, forward and backward; plain autograd would keep six.
Axes: N response tokens of all rollouts, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Unembed = Callable[[Tensor], Tensor]
"""[n, D] final hidden states to [n, V] float32 logits, differentiable (`FrozenLM.unembed`)."""


class TokenStats(NamedTuple):
    """Differentiable statistics of N response tokens, in nats."""

    logprobs: Tensor
    """[N] log pi(a)."""
    entropy: Tensor
    """[N] entropy of pi."""
    kl: Tensor
    """[N] KL(frozen || pi); zeros when no frozen distribution was given."""


def token_stats(
    hidden: Float[Tensor, "tokens d_model"],
    token_ids: Int[Tensor, " tokens"],
    unembed: Unembed,
    *,
    temperature: float = 1.0,
    frozen_logprobs: Float[Tensor, "tokens vocab"] | None = None,
) -> TokenStats:
    """Statistics of the policy at N tokens.

    Args:
        hidden: [N, D] predicted final hidden states.
        token_ids: [N] the tokens that were sampled.
        unembed: the frozen output layer.
        temperature: divides the logits, in sampling and in scoring alike.
        frozen_logprobs: [N, V] of the frozen model at the same temperature.
    """
    return TokenStats(*_TokenStats.apply(hidden, token_ids, unembed, temperature, frozen_logprobs))


def reverse_kl(
    hidden: Float[Tensor, "tokens d_model"],
    unembed: Unembed,
    frozen_logprobs: Float[Tensor, "tokens vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """KL(pi || frozen) in nats at each of N tokens, differentiable: the other way round than
    `token_stats`. On the policy's own responses it is what TRL's distillation takes by default
    (on-policy distillation: Agarwal et al. 2024, arXiv 2306.13649). Keeps some [N, V] for autograd.

    Args:
        hidden: [N, D] predicted final hidden states.
        unembed: the frozen output layer.
        frozen_logprobs: [N, V] of the frozen model at the same temperature.
        temperature: divides the logits.
    """
    logprobs = (unembed(hidden) / temperature).log_softmax(-1)
    return (logprobs.exp() * (logprobs - frozen_logprobs)).sum(-1)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        token_ids: Tensor,
        unembed: Unembed,
        temperature: float,
        frozen_logprobs: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0]
        leaf = hidden.detach().requires_grad_(needs_grad)
        with torch.set_grad_enabled(needs_grad):
            graph = unembed(leaf)
        logits = graph.detach() / temperature
        lse = logits.logsumexp(-1)
        logprobs = logits.gather(-1, token_ids[:, None])[:, 0] - lse
        probs = (logits - lse[:, None]).exp_()
        entropy = lse - torch.linalg.vecdot(probs, logits)
        kl = torch.zeros_like(lse)
        if frozen_logprobs is not None:
            frozen = frozen_logprobs.exp()
            kl = torch.linalg.vecdot(frozen, frozen_logprobs - logits) + lse
        if needs_grad:
            ctx.leaf, ctx.graph, ctx.temperature = leaf, graph, temperature
            ctx.logits, ctx.frozen = logits, frozen_logprobs
            ctx.save_for_backward(token_ids, lse, entropy)
        return logprobs, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, grad_kl: Tensor
    ) -> tuple[Tensor | None, ...]:
        token_ids, lse, entropy = ctx.saved_tensors
        if ctx.frozen is None:
            grad_kl = torch.zeros_like(grad_kl)
        log_p = ctx.logits - lse[:, None]
        p = log_p.exp()
        # p * (grad_kl - grad_logprobs - grad_entropy * (log p + H)), in the buffer of log p
        grad = log_p.add_(entropy[:, None]).mul_(-grad_entropy[:, None])
        grad.add_((grad_kl - grad_logprobs)[:, None]).mul_(p)
        grad.scatter_add_(-1, token_ids[:, None], grad_logprobs[:, None])
        if ctx.frozen is not None:
            grad.sub_(torch.exp(ctx.frozen, out=p).mul_(grad_kl[:, None]))
        grad.div_(ctx.temperature)
        (grad_hidden,) = torch.autograd.grad(ctx.graph, ctx.leaf, grad)
        ctx.graph = ctx.leaf = ctx.logits = ctx.frozen = None
        return grad_hidden, None, None, None, None
