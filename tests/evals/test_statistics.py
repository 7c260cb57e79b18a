"""Intervals and tests against closed forms and known coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rldecoder.errors import BadInputError
from rldecoder.evals.statistics import (
    bootstrap_mean_ci,
    paired_bootstrap_pvalue,
    wilson_interval,
)


@given(st.integers(1, 400), st.data())
def test_wilson_equals_its_closed_form(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    z, p = 1.959963984540054, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    found = wilson_interval(successes, trials)
    assert found.low == pytest.approx(centre - half, abs=1e-9)
    assert found.high == pytest.approx(centre + half, abs=1e-9)
    assert 0 <= found.low <= p <= found.high <= 1


def test_wilson_without_trials_knows_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(BadInputError):
        wilson_interval(5, 3)


def test_bootstrap_agrees_with_the_normal_interval_of_a_large_sample() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    found = bootstrap_mean_ci(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(0).exponential(size=50)
    assert bootstrap_mean_ci(values, seed=4) == bootstrap_mean_ci(values, seed=4)
    assert bootstrap_mean_ci(values, seed=4) != bootstrap_mean_ci(values, seed=5)


def test_constant_values_have_no_width() -> None:
    assert bootstrap_mean_ci([0.5]) == (0.5, 0.5, 0.5)
    assert bootstrap_mean_ci([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_scores_that_are_no_numbers_are_refused(values: list[float]) -> None:
    with pytest.raises(BadInputError):
        bootstrap_mean_ci(values)


def test_paired_test_sees_a_small_but_consistent_difference() -> None:
    rng = np.random.default_rng(0)
    b = rng.normal(0, 10, 200)
    a = b + rng.normal(0.1, 0.2, 200)
    found = paired_bootstrap_pvalue(a, b, seed=0)
    assert found.difference == pytest.approx((a - b).mean())
    assert found.pvalue < 0.01
    assert 0 < found.low < found.difference < found.high
    assert paired_bootstrap_pvalue(b, a, seed=0).pvalue > 0.95


def test_paired_pvalue_is_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    pvalues = [
        paired_bootstrap_pvalue(
            rng.normal(size=40), rng.normal(size=40), resamples=200, seed=i
        ).pvalue
        for i in range(200)
    ]
    assert np.mean(np.array(pvalues) < 0.1) == pytest.approx(0.1, abs=0.06)
    assert np.mean(pvalues) == pytest.approx(0.5, abs=0.06)


def test_equal_scores_are_no_evidence() -> None:
    assert paired_bootstrap_pvalue([1.0, 0.0], [1.0, 0.0]).pvalue == 1.0
    with pytest.raises(BadInputError, match="2 and 1"):
        paired_bootstrap_pvalue([1.0, 0.0], [1.0])
