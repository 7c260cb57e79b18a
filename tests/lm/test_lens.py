"""Lenses against scikit-learn, a direct sum, and scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from sklearn.linear_model import Ridge

from rldecoder.errors import NumericalError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.lens import (
    FrozenPredictions,
    Moments,
    PredictionSums,
    choose_affine,
    compare_predictions,
    fit_affine,
    logit_lens,
    mean_squared_error,
)

D = 6


def data(count: int, seed: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(D, D, generator=torch.Generator().manual_seed(99))
    # One dimension a thousand times larger and far from 0, like a residual's outlier.
    scale = torch.tensor([1000.0, *[1.0] * (D - 1)])
    x = torch.randn(count, D, generator=generator) * scale + 5 * scale
    y = (x / scale) @ weights + 2 + noise * torch.randn(count, D, generator=generator)
    return x, y


def moments(x: torch.Tensor, y: torch.Tensor, chunk: int = 7) -> Moments:
    sums = Moments(D)
    for start in range(0, len(x), chunk):
        sums.add(x[start : start + chunk], y[start : start + chunk])
    return sums


@pytest.mark.parametrize("strength", [1e-4, 0.1, 3.0])
def test_fit_equals_ridge_on_scaled_inputs(strength: float) -> None:
    x, y = data(200, 0)
    lens = fit_affine(moments(x, y), strength)
    inputs, outputs = x.double().numpy(), y.double().numpy()
    inputs = inputs / inputs.std(0)
    oracle = Ridge(alpha=strength * len(x), solver="cholesky").fit(inputs, outputs)
    expected = oracle.predict(inputs)
    assert np.allclose(lens(x).numpy(), expected, atol=1e-3)


def test_error_from_sums_equals_error_from_rows() -> None:
    lens = fit_affine(moments(*data(200, 0)), 0.01)
    x, y = data(150, 1)
    direct = (lens(x) - y).square().sum(-1).mean().item()
    assert mean_squared_error(moments(x, y), lens) == pytest.approx(direct, rel=1e-3)


def test_strength_is_chosen_on_validation() -> None:
    few, held_out = moments(*data(8, 0, noise=3.0)), moments(*data(500, 1, noise=3.0))
    strengths = (1e-6, 1.0, 1e6)
    chosen = choose_affine(few, held_out, strengths)
    errors = [mean_squared_error(held_out, fit_affine(few, s)) for s in strengths]
    assert chosen.strength == strengths[int(np.argmin(errors))] == 1.0
    plenty = moments(*data(5000, 0))
    assert choose_affine(plenty, moments(*data(500, 1)), strengths).strength == 1e-6


def test_constant_dimension_is_solved() -> None:
    x, y = data(50, 0)
    x[:, 2] = 4.0
    lens = fit_affine(moments(x, y), 1e-3)
    assert torch.isfinite(lens(x)).all()


def test_no_tokens_or_nan_is_an_error() -> None:
    with pytest.raises(NumericalError, match="0 tokens"):
        fit_affine(Moments(D), 0.1)
    x, y = data(20, 0)
    x[3, 1] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        fit_affine(moments(x, y), 0.1)


@pytest.mark.parametrize("fixture", ["tiny_lm_dir", "tiny_llama_dir"])
def test_lenses_of_a_model(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    lm = FrozenLM.load(folder)
    ids = torch.randint(0, lm.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    resids, final = lm.residuals(ids)
    assert torch.allclose(logit_lens(lm, resids[-1]), final, atol=1e-5)
    names = ["frozen", "logit"]
    sums = {name: PredictionSums() for name in names}
    hidden = logit_lens(lm, resids[1]).flatten(0, 1)
    targets = ids.flatten()
    compare_predictions(lm, final.flatten(0, 1), {"logit": hidden}, targets, sums, chunk_tokens=5)
    p = log_softmax(lm.unembed(final).flatten(0, 1).double().numpy(), axis=-1)
    q = log_softmax(lm.unembed(hidden).double().numpy(), axis=-1)
    lens, frozen = sums["logit"].means(), sums["frozen"].means()
    assert lens.kl == pytest.approx(rel_entr(np.exp(p), np.exp(q)).sum(-1).mean(), abs=1e-5)
    assert lens.ce == pytest.approx(-q[np.arange(18), targets].mean(), abs=1e-5)
    assert lens.accuracy == np.mean(q.argmax(-1) == targets.numpy())
    assert lens.agreement == np.mean(q.argmax(-1) == p.argmax(-1))
    assert (frozen.kl, frozen.agreement) == (0.0, 1.0)


def test_metrics_that_are_not_finite_are_an_error() -> None:
    sums = PredictionSums()
    with pytest.raises(NumericalError, match="0 tokens"):
        sums.means()
    frozen = FrozenPredictions.of(torch.zeros(1, 3), torch.tensor([0]))
    sums.add(torch.full((1, 3), float("nan")), frozen)
    with pytest.raises(NumericalError, match="not finite"):
        sums.means()
