"""Loss terms against naive loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rldecoder.sae.losses import auxk_loss, l0_loss, l1_loss, reconstruction_loss
from rldecoder.sae.sparse_ops import SaeWeights

N, D, L = 9, 6, 20


@pytest.fixture
def weights() -> SaeWeights:
    torch.manual_seed(0)
    return SaeWeights(*(nn.Parameter(torch.randn(s)) for s in ((L, D), (L,), (L, D), (D,))))


def test_reconstruction_loss_is_fvu_on_unit_variance() -> None:
    x = torch.randn(4000, D)
    recon = 0.8 * x
    fvu = (x - recon).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(reconstruction_loss(recon[:, None], x), fvu, rtol=0.05, atol=0)
    nested = torch.stack([torch.zeros_like(x), recon], dim=1)
    torch.testing.assert_close(reconstruction_loss(nested, x), (1 + fvu) / 2, rtol=0.05, atol=0)


def test_l0_loss_pulls_towards_its_target() -> None:
    l0 = torch.tensor(3.0, requires_grad=True)
    for target, loss, slope in ((3.0, 0.0, 0.0), (2.0, 0.25, 0.5), (6.0, 0.25, -1 / 6)):
        value = l0_loss(l0, target)
        assert value.item() == loss
        assert torch.autograd.grad(value, l0)[0].item() == pytest.approx(slope)


def test_l1_loss_sums_per_token() -> None:
    assert float(l1_loss(torch.tensor([1.0, 2.0, 3.0]), 2)) == 3.0


@pytest.mark.parametrize("auxk", [2, 5, 12])
def test_auxk_loss_is_the_definition(weights: SaeWeights, auxk: int) -> None:
    dead = torch.tensor([1, 4, 5, 11, 19])
    x, error = torch.randn(N, D), torch.randn(N, D)
    used = min(auxk, len(dead))
    left = 0.0
    for token in range(N):
        pre_acts = {
            int(i): ((x[token] - weights.b_dec) @ weights.enc[i] + weights.b_enc[i]).item()
            for i in dead
        }
        recon = torch.zeros(D)
        for latent in sorted(pre_acts, key=lambda i: -pre_acts[i])[:used]:
            recon += max(pre_acts[latent], 0.0) * weights.dec[latent].detach()
        left += float((recon - error[token]).square().sum())
    want = left / float(error.square().sum()) * used / auxk
    got = auxk_loss(x, error, weights, dead, auxk).item()
    assert got == pytest.approx(want, rel=1e-4)


def test_auxk_gradient_reaches_dead_latents_only(weights: SaeWeights) -> None:
    dead = torch.tensor([2, 3, 7])
    error = torch.randn(N, D, requires_grad=True)
    auxk_loss(torch.randn(N, D), error, weights, dead, 3).backward()
    assert error.grad is None
    assert weights.b_dec.grad is None
    assert weights.dec.grad is not None
    touched = weights.dec.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched
    assert set(touched) <= {2, 3, 7}
