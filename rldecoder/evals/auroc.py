"""AUROC of several scores on the same items, with items that come in groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from rldecoder.errors import BadInputError
from rldecoder.evals.statistics import FloatArray, PairedTest, percentiles

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

# Comparisons of a positive with a negative item are made in blocks of about this many.
BLOCK_PAIRS = 4_000_000


class AurocInterval(NamedTuple):
    """The area under the ROC curve with its confidence interval."""

    auroc: float
    low: float
    high: float


class AurocComparison(NamedTuple):
    """AUROC of every score, and how far the reference is ahead of each of the others."""

    scores: dict[str, AurocInterval]
    ahead: dict[str, PairedTest]
    """AUROC of the reference minus that of the other, on the same resamples."""


def compare_auroc(
    outcomes: BoolArray,
    scores: Mapping[str, FloatArray],
    groups: IntArray,
    *,
    reference: str,
    resamples: int = 2000,
    seed: int = 0,
) -> AurocComparison | None:
    """AUROC of each score for the same outcomes; bootstrap over groups, not over items.

    Items of one group (interventions on one position) share what makes them easy or hard, so
    whole groups are drawn with replacement; every score sees the same draws. Percentile
    intervals; the one-sided p-value is (1 + #{resampled difference <= 0}) / (1 + resamples),
    where draws without both outcomes count as not ahead.

    Args:
        outcomes: [n], what happened.
        scores: [n] each; higher should mean a likelier outcome. Ties count a half.
        groups: [n], which group an item belongs to.
        reference: the score that the others are compared with.

    Returns: None when an outcome never occurs, or always: then there is no curve.

    Raises:
        BadInputError: scores of another length, or not finite.

    Source: Hanley and McNeil 1982 for the area as a share of ordered pairs; Field and Welsh
        2007 for the cluster bootstrap.
    """
    for name, values in scores.items():
        if values.shape != outcomes.shape or not np.isfinite(values).all():
            raise BadInputError(
                f"The scores of {name} cannot be compared with {outcomes.size} outcomes.",
                "There must be one finite score for each.",
                "Check how the scores were made.",
            )
    if outcomes.all() or not outcomes.any():
        return None

    # One table of how often each group is drawn serves every score: resamples are paired.
    _, group = np.unique(groups, return_inverse=True)
    count = int(group.max()) + 1
    weights = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=resamples
    )
    pairs = (weights @ np.bincount(group[outcomes], minlength=count)) * (
        weights @ np.bincount(group[~outcomes], minlength=count)
    )
    usable = pairs > 0

    areas, draws = {}, {}
    for name, values in scores.items():
        credits = _ordered_pairs(outcomes, values, group, count)
        ordered = np.einsum("rg,rg->r", weights @ credits, weights)
        draws[name] = ordered[usable] / pairs[usable]
        area = float(roc_auc_score(outcomes, values))
        areas[name] = AurocInterval(area, *percentiles(draws[name]))

    ahead = {}
    for name in scores:
        if name == reference:
            continue
        difference = draws[reference] - draws[name]
        low, high = percentiles(difference)
        not_ahead = int((difference <= 0).sum()) + int((~usable).sum())
        ahead[name] = PairedTest(
            difference=areas[reference].auroc - areas[name].auroc,
            low=low,
            high=high,
            pvalue=(1 + not_ahead) / (1 + resamples),
        )
    return AurocComparison(areas, ahead)


def _ordered_pairs(
    outcomes: BoolArray, values: FloatArray, group: IntArray, count: int
) -> FloatArray:
    """[G, G]: pairs (positive of group g, negative of group h) in the right order, ties a half.

    The AUROC of any draw of groups is a quotient of sums over this table: nothing is sorted
    again for a resample.
    """
    negatives = np.flatnonzero(~outcomes)
    negatives = negatives[np.argsort(group[negatives], kind="stable")]
    present, starts = np.unique(group[negatives], return_index=True)
    table = np.zeros((count, count))
    positives = np.flatnonzero(outcomes)
    block = max(1, BLOCK_PAIRS // len(negatives))
    for start in range(0, len(positives), block):
        rows = positives[start : start + block]
        mine, theirs = values[rows, None], values[negatives]
        credit = (mine > theirs) + 0.5 * (mine == theirs)
        by_group = np.zeros((len(rows), count))
        by_group[:, present] = np.add.reduceat(credit, starts, axis=1)
        np.add.at(table, group[rows], by_group)
    return table
