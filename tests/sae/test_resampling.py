"""Dead latents get the directions of badly reconstructed inputs, and a clean optimiser state."""

from __future__ import annotations

import torch
from torch import nn

from rldecoder.sae.resampling import ENCODER_SHARE, resample_dead
from rldecoder.sae.sparse_ops import SaeWeights

D, L = 5, 12


def make() -> tuple[SaeWeights, torch.optim.Adam]:
    torch.manual_seed(0)
    weights = SaeWeights(*(nn.Parameter(torch.randn(s)) for s in ((L, D), (L,), (L, D), (D,))))
    optimizer = torch.optim.Adam(weights)
    sum(w.square().sum() for w in weights).backward()
    optimizer.step()
    return weights, optimizer


def test_only_bad_inputs_are_drawn_and_only_dead_latents_change() -> None:
    weights, optimizer = make()
    before = [w.detach().clone() for w in weights]
    x = torch.randn(6, D)
    recon = x.clone()
    recon[[1, 4]] += 1.0
    dead = torch.tensor([3, 8])
    generator = torch.Generator().manual_seed(0)
    assert resample_dead(weights, optimizer, dead, x, recon, generator) == 2
    want = nn.functional.normalize(x[[1, 4]] - weights.b_dec.detach(), dim=1)
    got = weights.dec.detach()[dead]
    assert torch.allclose(got, want) or torch.allclose(got, want.flip(0))
    alive = [i for i in range(L) if i not in (3, 8)]
    for old, new in zip(before[:3], weights[:3], strict=True):
        assert torch.equal(old[alive], new[alive])
    norm = before[0][alive].norm(dim=1).mean() * ENCODER_SHARE
    torch.testing.assert_close(weights.enc[dead].norm(dim=1), norm.expand(2))
    assert not weights.b_enc[dead].any()
    moments = optimizer.state[weights.dec]["exp_avg"]
    assert not moments[dead].any()
    assert moments[alive].all()


def test_a_small_batch_revives_what_it_can() -> None:
    weights, optimizer = make()
    x = torch.randn(3, D)
    generator = torch.Generator().manual_seed(0)
    recon = torch.zeros_like(x)
    assert resample_dead(weights, optimizer, torch.arange(7), x, recon, generator) == 3
    assert resample_dead(weights, optimizer, torch.arange(7), x, x.clone(), generator) == 0
