"""Metrics against closed forms and naive recomputation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from rldecoder.errors import BadInputError
from rldecoder.sae.metrics import (
    near_duplicate_fraction,
    random_control,
    reconstruction_quality,
    usage_entropy,
)
from rldecoder.sae.model import Sae, SaeSpec

SPEC = SaeSpec(architecture="topk", d_model=16, num_latents=64, k=6)
RELU = SaeSpec(architecture="relu", d_model=16, num_latents=64)
JUMP = SaeSpec(architecture="jumprelu", d_model=16, num_latents=64)


def data(num_tokens: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(num_tokens, 16, generator=generator) * 3 + 5


def test_quality_is_the_definition_whatever_the_batches() -> None:
    x = data()
    sae = Sae.random_init(SPEC, 0, x.mean(0)).requires_grad_(False)
    whole = reconstruction_quality(sae, [x])
    parts = reconstruction_quality(sae, x.split(37))
    recon, dense = sae(x).recon.double(), sae.encode_dense(x)
    error = (x - recon).square()
    assert whole.fvu == pytest.approx(float(error.sum() / (x - x.mean(0)).square().sum()), rel=1e-5)
    assert whole.normalised_mse == pytest.approx(float(error.sum() / x.square().sum()), rel=1e-5)
    assert whole.mse == pytest.approx(float(error.mean()), rel=1e-5)
    assert torch.allclose(whole.density, (dense > 0).double().mean(0))
    l0 = (dense > 0).sum(1).double()
    assert whole.l0_mean == pytest.approx(float(l0.mean()))
    assert whole.l0_percentiles == pytest.approx(tuple(np.percentile(l0, (5, 50, 95))))
    assert whole.dead_fraction == float(((dense > 0).sum(0) == 0).float().mean())
    assert parts.fvu == pytest.approx(whole.fvu, rel=1e-6)
    assert parts.cosine == pytest.approx(whole.cosine, rel=1e-6)
    assert torch.equal(parts.density, whole.density)


def test_known_reconstructions() -> None:
    """An orthonormal dictionary of +-axes is perfect; one that never fires explains nothing."""
    x = data()
    axes = torch.cat([torch.eye(16), -torch.eye(16)])
    spec = SaeSpec(architecture="relu", d_model=16, num_latents=32)
    sae = Sae.random_init(spec, 0, x.mean(0)).requires_grad_(False)
    sae.W_dec.copy_(axes)
    sae.W_enc.copy_(axes.T)
    perfect = reconstruction_quality(sae, [x])
    assert perfect.fvu < 1e-10
    assert perfect.explained_variance > 1 - 1e-10
    assert perfect.cosine == pytest.approx(1.0)
    assert perfect.l0_mean == pytest.approx(16)
    sae.b_enc.fill_(-1e3)
    silent = reconstruction_quality(sae, [x])
    assert silent.fvu == pytest.approx(1.0, rel=1e-5)
    assert (silent.l0_mean, silent.dead_fraction) == (0.0, 1.0)


def test_no_tokens_is_bad_input() -> None:
    with pytest.raises(BadInputError, match="no held-out"):
        reconstruction_quality(Sae.random_init(SPEC, 0), [])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_usage_entropy_is_scipys(density: list[float]) -> None:
    usage = usage_entropy(torch.tensor(density, dtype=torch.float64))
    want = float(entropy(density)) if sum(density) > 0 else 0.0
    assert usage.entropy == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert usage.effective_latents == pytest.approx(math.exp(want))
    assert usage.normalised_entropy == pytest.approx(want / math.log(len(density)))


def test_even_usage_has_entropy_one() -> None:
    assert usage_entropy(torch.full((50,), 0.02)).normalised_entropy == pytest.approx(1.0)


def test_near_duplicates() -> None:
    rows = torch.eye(8)
    rows[1] = rows[0] * 3 + rows[2] * 0.3
    rows[5] = -rows[4]
    want = 2 / 8
    assert near_duplicate_fraction(rows, 0.9) == want
    assert near_duplicate_fraction(rows, 0.9, chunk=3) == want
    assert near_duplicate_fraction(rows, 0.999) == 0.0


@pytest.mark.parametrize("spec", [SPEC, RELU, JUMP])
def test_control_matches_l0_and_uses_its_best_gain(spec: SaeSpec) -> None:
    x = data(2000)
    control = random_control(spec, 1, x, 6.0)
    quality = reconstruction_quality(control, [x])
    assert quality.l0_mean == pytest.approx(6.0, abs=0.05)
    assert quality.fvu < 1.0
    for gain in (0.9, 1.1):
        worse = Sae(spec).requires_grad_(False)
        worse.load_state_dict(control.state_dict())
        worse.W_dec.mul_(gain)
        assert reconstruction_quality(worse, [x]).fvu > quality.fvu
