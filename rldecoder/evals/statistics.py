"""95 % intervals and paired tests for scores, thin over `scipy.stats` and always seeded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.errors import BadInputError
from rldecoder.schemas import JsonRecord

FloatArray = NDArray[np.float64]

# Resamples are drawn in blocks of about this many numbers, so that memory does not grow with n.
BLOCK_NUMBERS = 4_000_000
RESAMPLES = 2000
TAILS = ((1 - 0.95) / 2, 1 - (1 - 0.95) / 2)


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


class Measured(JsonRecord):
    """A published number with its confidence interval."""

    value: float | None
    """None where it is not defined."""
    low: float | None
    high: float | None


class MeanInterval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


class PairedTest(JsonRecord):
    """The result of a paired comparison of scores `a` against `b`."""

    difference: float
    """mean(a) - mean(b), in the unit of the scores."""
    low: float
    """Of its confidence interval, both ends included."""
    high: float
    pvalue: float
    """One-sided: how likely a difference this large is when a is no better than b."""


def wilson_interval(successes: float, trials: int) -> Interval:
    """Wilson's score interval of a proportion; (0, 1) when there are no trials.

    Unlike mean +- 1.96 sd it stays inside [0, 1] and has a width at 0 % and 100 %.
    Fractional successes (partial credit) are rounded to the nearest count.
    Source: Wilson 1927; `scipy.stats.binomtest(...).proportion_ci(method="wilson")`.

    Raises:
        BadInputError: successes outside [0, trials].
    """
    if trials == 0:
        return Interval(0.0, 1.0)
    count = round(successes)
    if not 0 <= count <= trials:
        raise BadInputError(
            f"{successes} successes in {trials} trials are impossible.",
            "A proportion needs 0 <= successes <= trials.",
            "Check how the scores were counted.",
        )
    from scipy import stats  # slow

    found = stats.binomtest(count, trials).proportion_ci(method="wilson")
    return Interval(float(found.low), float(found.high))


def proportion(part: int, whole: int) -> Measured:
    """A share with its Wilson interval; None of nothing."""
    low, high = wilson_interval(part, whole)
    return Measured(value=part / whole if whole else None, low=low, high=high)


def bootstrap_mean_ci(
    values: Sequence[float] | FloatArray, *, resamples: int = RESAMPLES, seed: int = 0
) -> MeanInterval:
    """Percentile bootstrap of a mean (BCa where it is defined is not worth its traps here).

    With one value, or with values that are all equal, the interval is the mean itself.

    Raises:
        BadInputError: no values, or a value that is not finite.
    """
    array = _finite(values)
    if array.size == 1 or np.ptp(array) == 0:
        mean = float(array[0])
        return MeanInterval(mean, mean, mean)
    from scipy import stats  # slow

    found = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        batch=max(1, BLOCK_NUMBERS // array.size),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return MeanInterval(float(array.mean()), float(found.low), float(found.high))


def paired_bootstrap_pvalue(
    a: Sequence[float] | FloatArray,
    b: Sequence[float] | FloatArray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedTest:
    """Is `a` better than `b` on the same items? Percentile bootstrap of the paired difference.

    The p-value is one-sided, (1 + #{resampled difference <= 0}) / (1 + resamples), so it is
    never 0 and never below what the number of resamples can show.
    Source: Efron and Tibshirani 1993, chapter 16; Koehn 2004.

    Raises:
        BadInputError: lengths differ, no values, or a value that is not finite.
    """
    first, second = _finite(a), _finite(b)
    if first.shape != second.shape:
        raise BadInputError(
            f"Paired scores have {first.size} and {second.size} values.",
            "A paired test compares two methods on the same items.",
            "Score both methods on the same prompts, in the same order.",
        )
    difference = first - second
    means = _resampled_means(difference, resamples, seed)
    return _paired_test(float(difference.mean()), means)


def two_sample_bootstrap(
    a: Sequence[float] | FloatArray, b: Sequence[float] | FloatArray
) -> MeanInterval:
    """mean(a) - mean(b) of scores of different items; percentile bootstrap, each resampled alone.

    Raises:
        BadInputError: no values in one of them, or a value that is not finite.
    """
    first, second = _finite(a), _finite(b)
    # Two seeds: with one, samples of equal size would be drawn alike.
    means = _resampled_means(first, RESAMPLES, 0) - _resampled_means(second, RESAMPLES, 1)
    return MeanInterval(float(first.mean() - second.mean()), *percentiles(means))


def crossed_bootstrap(
    differences: FloatArray,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedTest:
    """Is the mean of [S, P] paired differences above 0, over S trainings and P shared items?

    Trainings and items are resampled independently of each other, so that the interval covers
    other seeds as well as other items (the pigeonhole bootstrap, which errs on the wide side).
    With one training it is `paired_bootstrap_pvalue`. Percentile interval; one-sided p-value.
    Source: Owen 2007, arXiv 0711.1404; of groups: Davison and Hinkley 1997, section 3.8.

    Args:
        differences: [S, P].
        groups: P names; items of one group are drawn together (a cluster bootstrap), because what
            is asked in several wordings is not several independent items.

    Raises:
        BadInputError: no values, a value that is not finite, or another number of names.
    """
    array = np.asarray(differences, dtype=np.float64)
    trainings, items = array.shape
    if trainings == 1 and groups is None:
        zeros = np.zeros(items)
        return paired_bootstrap_pvalue(array[0], zeros, resamples=resamples, seed=seed)
    _finite(array)
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(trainings, np.full(trainings, 1 / trainings), size=resamples)
    columns = _drawn(items, groups, resamples, rng)
    sums = np.einsum("rs,sp,rp->r", rows, array, columns, optimize=True)
    # Groups may differ in size, so that a resample may hold more items than there are.
    means = sums / (trainings * columns.sum(1))
    return _paired_test(float(array.mean()), means)


def _paired_test(difference: float, means: FloatArray) -> PairedTest:
    """Percentile interval and one-sided p-value of a difference, from its resampled means."""
    pvalue = (1 + int((means <= 0).sum())) / (1 + means.size)
    low, high = percentiles(means)
    return PairedTest(difference=difference, low=low, high=high, pvalue=pvalue)


def percentiles(means: FloatArray) -> tuple[float, float]:
    """The ends of the 95 % interval of resampled means."""
    low, high = np.quantile(means, TAILS)
    return float(low), float(high)


def with_interval(values: FloatArray) -> Measured:
    """The first value with the 95 % interval of the defined ones of the others, its resamples."""
    resampled = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or resampled.size == 0:
        return Measured(value=None, low=None, high=None)
    low, high = percentiles(resampled)
    return Measured(value=float(values[0]), low=low, high=high)


def _drawn(
    items: int, groups: Sequence[str] | None, resamples: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """[resamples, items] how often each item is drawn, whole groups at a time."""
    if groups is None:
        return rng.multinomial(items, np.full(items, 1 / items), size=resamples)
    if len(groups) != items:
        raise BadInputError(
            f"{items} items have {len(groups)} groups.",
            "Each item belongs to one group.",
            "Name the group of every item, in their order.",
        )
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return drawn[:, group]


def _resampled_means(values: FloatArray, resamples: int, seed: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK_NUMBERS // values.size)
    means = [
        values[rng.integers(0, values.size, (min(block, resamples - start), values.size))].mean(1)
        for start in range(0, resamples, block)
    ]
    return np.concatenate(means)


def _finite(values: Sequence[float] | FloatArray) -> FloatArray:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0 or not np.isfinite(array).all():
        raise BadInputError(
            "A mean was asked of no scores, or of a score that is not a finite number.",
            "Missing scores must be left out or counted as wrong before the statistics.",
            "Check the rows that were scored.",
        )
    return array
