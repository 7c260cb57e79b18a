"""The fused statistics against plain autograd."""

from __future__ import annotations

import pytest
import torch

from rldecoder.rl import core
from rldecoder.rl.policy import reverse_kl, token_stats


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_frozen", [True, False])
def test_values_and_gradients_equal_plain_autograd(temperature, with_frozen):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (5,), generator=generator)
    frozen = torch.randn(5, 11, generator=generator, dtype=torch.float64).log_softmax(-1)
    mix = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def unembed(h):
        return torch.tanh(torch.nn.functional.linear(h, weight, bias) / 5) * 5  # soft cap

    ours = hidden.clone().requires_grad_()
    found = token_stats(
        ours,
        tokens,
        unembed,
        temperature=temperature,
        frozen_logprobs=frozen if with_frozen else None,
    )
    plain = hidden.clone().requires_grad_()
    logprobs = (unembed(plain) / temperature).log_softmax(-1)
    kl = core.exact_kl(frozen, logprobs) if with_frozen else torch.zeros(5, dtype=torch.float64)
    expected = (logprobs.gather(-1, tokens[:, None])[:, 0], core.entropy(logprobs), kl)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    sum((m * x).sum() for m, x in zip(mix, found, strict=True)).backward()
    sum((m * x).sum() for m, x in zip(mix, expected, strict=True)).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_no_graph_without_gradients():
    hidden = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(6, 4)
    with torch.no_grad():
        found = token_stats(hidden, torch.tensor([1, 2]), lambda h: h @ weight.T)
    assert not found.logprobs.requires_grad
    assert (found.kl == 0).all()


def test_the_reverse_kl_looks_the_other_way():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    frozen = torch.randn(5, 11, generator=generator, dtype=torch.float64).log_softmax(-1)
    found = reverse_kl(hidden, lambda h: h @ weight.T, frozen, temperature=0.7)
    pi = torch.distributions.Categorical(logits=hidden @ weight.T / 0.7)
    expected = torch.distributions.kl_divergence(pi, torch.distributions.Categorical(logits=frozen))
    torch.testing.assert_close(found, expected)

    # Minimal, with a gradient of zero, where both are the same.
    same = (hidden @ weight.T / 0.7).log_softmax(-1).detach()
    none = reverse_kl(hidden, lambda h: h @ weight.T, same, temperature=0.7)
    none.sum().backward()
    torch.testing.assert_close(none, torch.zeros_like(none))
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden))
