"""Schedules at their corners."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rldecoder.config.sae import SparsityPhase, TrainSaeConfig
from rldecoder.sae.schedule import (
    learning_rate,
    learning_rate_scale,
    sparsity_coefficient,
)

PHASES = TrainSaeConfig().sparsity_phases


def test_learning_rate_rises_stays_falls() -> None:
    config = TrainSaeConfig(lr=1e-4, lr_final=1e-5, warmup_steps=9, decay_from=0.5)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[9] == rates[49] == pytest.approx(1e-4)
    assert rates[99] == pytest.approx(1e-5)
    assert rates[50:] == sorted(rates[50:], reverse=True)


@given(st.integers(1, 300), st.integers(0, 50), st.floats(0, 1))
def test_learning_rate_stays_in_its_band(num_steps: int, warmup: int, decay: float) -> None:
    config = TrainSaeConfig(lr=1e-3, lr_final=1e-4, warmup_steps=warmup, decay_from=decay)
    for step in range(num_steps):
        assert 0 < learning_rate(config, step, num_steps) <= 1e-3 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("step", "want"),
    [(0, 1e-6), (499, 5e-4), (999, 1e-3), (9_999, 1e-3), (10_000, 1e-2), (39_999, 1e-2),
     (40_000, 1e-3), (49_999, 1e-3), (80_000, 1e-3)],
)  # fmt: skip
def test_the_plans_sparsity_schedule(step: int, want: float) -> None:
    assert sparsity_coefficient(PHASES, 1000, step) == pytest.approx(want, rel=2e-3)


def test_the_rate_falls_with_the_dictionarys_size() -> None:
    given, scaled = TrainSaeConfig(), TrainSaeConfig(lr_reference_latents=1 << 14)
    assert learning_rate_scale(given, 1 << 20) == 1
    assert learning_rate_scale(scaled, 1 << 14) == 1
    assert learning_rate_scale(scaled, 1 << 16) == pytest.approx(0.5)


def test_sparsity_without_warm_up() -> None:
    phases = (SparsityPhase(steps=2, coefficient=0.5), SparsityPhase(steps=1, coefficient=0.1))
    assert [sparsity_coefficient(phases, 0, s) for s in range(4)] == [0.5, 0.5, 0.1, 0.1]
