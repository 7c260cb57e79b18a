"""AUROC with groups against scikit-learn on every resample, and a test that can fail."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from rldecoder.errors import BadInputError
from rldecoder.evals import auroc
from rldecoder.evals.auroc import compare_auroc


def draws(groups: int, resamples: int, seed: int) -> np.ndarray:
    """The weights that the bootstrap draws, restated here."""
    return np.random.default_rng(seed).multinomial(
        groups, np.full(groups, 1 / groups), size=resamples
    )


@given(st.integers(0, 10_000), st.integers(2, 8), st.sampled_from([1, 7, 10**6]))
def test_every_resample_is_scikit_learns_weighted_auroc(seed: int, groups: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, 40)
    _, group = np.unique(group, return_inverse=True)
    count = int(group.max()) + 1
    outcomes = rng.random(40) < 0.4
    outcomes[:2] = True, False
    scores = {"a": rng.integers(0, 6, 40).astype(float), "b": rng.normal(size=40)}  # ties in a
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auroc, "BLOCK_PAIRS", block)
        found = compare_auroc(outcomes, scores, group * 3, reference="a", resamples=30, seed=seed)
    assert found is not None
    expected: dict[str, list[float]] = {"a": [], "b": []}
    skipped = 0
    for weights in draws(count, 30, seed):
        weight = weights[group]
        if not weight[outcomes].any() or not weight[~outcomes].any():
            skipped += 1
            continue
        for name, values in scores.items():
            expected[name].append(roc_auc_score(outcomes, values, sample_weight=weight))
    for name, values in scores.items():
        assert found.scores[name].auroc == pytest.approx(roc_auc_score(outcomes, values))
        assert found.scores[name].low == pytest.approx(np.quantile(expected[name], 0.025))
        assert found.scores[name].high == pytest.approx(np.quantile(expected[name], 0.975))
    difference = np.subtract(expected["a"], expected["b"])
    # Differences of nearly 0 may round to either side.
    sure = int((difference < -1e-9).sum()) + skipped
    maybe = int((difference < 1e-9).sum()) + skipped
    assert (1 + sure) / 31 <= found.ahead["b"].pvalue <= (1 + maybe) / 31


def test_a_score_that_knows_is_ahead_of_one_that_does_not() -> None:
    rng = np.random.default_rng(0)
    outcomes = rng.random(400) < 0.3
    scores = {"knows": outcomes + rng.normal(size=400), "lot": rng.normal(size=400)}
    groups = np.repeat(np.arange(100), 4)
    found = compare_auroc(outcomes, scores, groups, reference="knows", resamples=500)
    assert found is not None
    assert found.ahead["lot"].pvalue < 0.01
    back = compare_auroc(outcomes, scores, groups, reference="lot", resamples=500)
    assert back is not None
    assert back.ahead["knows"].pvalue > 0.99


def test_groups_that_repeat_one_item_widen_the_interval() -> None:
    """Ten copies of every item are no new evidence."""
    rng = np.random.default_rng(1)
    outcomes = rng.random(60) < 0.5
    scores = {"a": outcomes + rng.normal(size=60)}
    once = compare_auroc(outcomes, scores, np.arange(60), reference="a", resamples=800)
    copied = np.repeat(outcomes, 10)
    tenfold = {"a": np.repeat(scores["a"], 10)}
    groups = np.repeat(np.arange(60), 10)
    honest = compare_auroc(copied, tenfold, groups, reference="a", resamples=800)
    naive = compare_auroc(copied, tenfold, np.arange(600), reference="a", resamples=800)
    assert once is not None
    assert honest is not None
    assert naive is not None
    assert honest.scores["a"] == pytest.approx(once.scores["a"])
    width = honest.scores["a"].high - honest.scores["a"].low
    assert naive.scores["a"].high - naive.scores["a"].low < 0.6 * width


def test_one_outcome_alone_has_no_curve_and_bad_scores_are_refused() -> None:
    groups = np.arange(3)
    assert compare_auroc(np.ones(3, bool), {"a": np.ones(3)}, groups, reference="a") is None
    assert compare_auroc(np.zeros(3, bool), {"a": np.ones(3)}, groups, reference="a") is None
    mixed = np.array([True, False, True])
    for values in (np.ones(2), np.array([0.0, np.nan, 1.0])):
        with pytest.raises(BadInputError, match="scores of a"):
            compare_auroc(mixed, {"a": values}, groups, reference="a")
