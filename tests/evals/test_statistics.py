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
    crossed_bootstrap,
    paired_bootstrap_pvalue,
    two_sample_bootstrap,
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


def test_crossed_bootstrap_of_one_training_is_the_paired_one() -> None:
    differences = np.random.default_rng(0).normal(0.2, 1.0, 40)
    found = crossed_bootstrap(differences[None], seed=3)
    assert found == paired_bootstrap_pvalue(differences, np.zeros(40), seed=3)


def test_crossed_bootstrap_covers_both_kinds_of_chance() -> None:
    """Rows + columns with known variances: the width is near that of the mean (from above)."""
    rng = np.random.default_rng(1)
    trainings, items, covered, widths = 6, 30, 0, []
    for trial in range(200):
        values = rng.normal(0, 0.3, (trainings, 1)) + rng.normal(0, 0.5, (1, items))
        found = crossed_bootstrap(values, seed=trial, resamples=400)
        covered += found.low <= 0 <= found.high
        widths.append(found.high - found.low)
    assert covered / 200 > 0.85
    spread = (0.3**2 / trainings + 0.5**2 / items) ** 0.5
    assert 0.8 < np.mean(widths) / (2 * 1.96 * spread) < 1.3


@pytest.mark.parametrize("trainings", [1, 3])
def test_groups_of_identical_items_widen_the_interval_as_the_closed_form_says(
    trainings: int,
) -> None:
    """r copies of G values tell as much as the G values: sqrt(r) wider than G r of them."""
    groups, copies = 40, 4
    values = np.tile(np.random.default_rng(3).normal(0.2, 1.0, groups), (trainings, 1))
    items = np.repeat(values, copies, axis=1)
    names = [f"{i // copies}" for i in range(groups * copies)]
    naive = crossed_bootstrap(items, resamples=20_000)
    found = crossed_bootstrap(items, groups=names, resamples=20_000)
    width, narrow = found.high - found.low, naive.high - naive.low
    assert width / narrow == pytest.approx(copies**0.5, rel=0.05)
    # 2 x 1.96 standard errors of G independent values
    assert width == pytest.approx(2 * 1.96 * values[0].std() / groups**0.5, rel=0.05)
    assert found.difference == naive.difference == pytest.approx(values.mean())


def test_groups_of_unequal_size_count_by_their_items() -> None:
    values, names = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    found = crossed_bootstrap(np.array([values]), groups=names)
    assert found.difference == 0.75
    assert (found.low, found.high) == (0.0, 1.0)  # two groups: often the same one twice
    rng = np.random.default_rng(0)
    draws = [rng.choice(["a", "b"], 2) for _ in range(4000)]
    sums = [[1.0] * 3 * list(d).count("a") + [0.0] * list(d).count("b") for d in draws]
    assert found.pvalue == pytest.approx(np.mean([np.mean(s) <= 0 for s in sums]), abs=0.03)
    with pytest.raises(BadInputError, match="4 items have 3 groups"):
        crossed_bootstrap(np.array([values]), groups=names[:3])


def test_crossed_bootstrap_resamples_both_axes_by_brute_force() -> None:
    values = np.random.default_rng(2).normal(0.3, 1.0, (3, 8))
    found = crossed_bootstrap(values, seed=0, resamples=20_000)
    rng = np.random.default_rng(5)
    means = [
        values[np.ix_(rng.integers(0, 3, 3), rng.integers(0, 8, 8))].mean() for _ in range(20_000)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.difference == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    assert found.pvalue == pytest.approx(np.mean(np.array(means) <= 0), abs=0.02)


def test_two_samples_are_resampled_apart() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(1.0, 1.0, 3000), rng.normal(0.5, 2.0, 3000)
    found = two_sample_bootstrap(a, b)
    half = 1.96 * math.sqrt(a.var() / a.size + b.var() / b.size)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)
    # Not as pairs: of equal samples the difference is uncertain all the same.
    same = two_sample_bootstrap(a, a)
    assert same.mean == 0
    assert same.low < -0.02
    assert same.high > 0.02
    with pytest.raises(BadInputError):
        two_sample_bootstrap([], [1.0])
