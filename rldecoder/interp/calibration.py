"""How sure a label is: p(accept), calibrated without the text that labels are scored on.

A label of what a latent fires on is *accepted* on a text if its detection balanced accuracy and its
population precision reach the configured bars there; one of what it raises if it passes in all
three parts (`Acceptance.accepts_output`). This stands in for a person's verdict until there are
verdicts (see `review`). The documents of the `label` split are dealt into three folds. In each of
three rotations a label is fitted on one fold, measured on the second (that gives the features), and
accepted or not on the third (that gives the outcome). A logistic regression maps features to
p(accept). The final label is fitted on all folds; its features are its fit there and the means of
the rotations' measurements. ECE and Brier are then computed on the `test` split, which took no part
in any of it.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import BaseCrossValidator, GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from rldecoder.evals.statistics import Measured, proportion, wilson_interval
from rldecoder.interp.records import OutputScores, Scores
from rldecoder.interp.scores import LabelScores
from rldecoder.schemas import JsonRecord

FloatArray = NDArray[np.float64]
NUM_ROTATIONS = 3
NUM_BINS = 10
MIN_ROWS = 10
"""With fewer nothing is fitted."""
PRECISION_BAR = 0.8
"""Accepted precision that the Wilson lower bound must reach for a label to be high-confidence."""


class Acceptance(JsonRecord):
    """When a label passes on a text."""

    detection: float
    """Least detection balanced accuracy of an input label."""
    precision: float
    """Least population precision of one."""
    auroc: float = 0.95
    """Least AUROC of an output label, of mean drops; the intervals of its drop and its margin must
    lie above 0."""
    auroc_places: float = 0.85
    """Least AUROC place by place."""

    def accepts(self, scores: Scores | None) -> bool:
        """Whether the scores reach both bars; undefined or missing scores do not."""
        if scores is None or scores.detection is None or scores.precision is None:
            return False
        return scores.detection >= self.detection and scores.precision >= self.precision

    def accepts_output(self, scores: OutputScores | None) -> bool:
        """Whether an output label passes in all three parts: its own set falls more than others',
        it falls for sure, and more than without another latent of the same place and length."""
        if scores is None or scores.drop_low is None or scores.margin_low is None:
            return False
        above = scores.auroc >= self.auroc and scores.auroc_places >= self.auroc_places
        return above and scores.drop_low > 0 and scores.margin_low > 0


class Calibration(NamedTuple):
    """Rows for fitting: one a labelled latent and rotation. R rows, F features."""

    features: FloatArray
    """[R, F] from `confidence_features`."""
    accepted: NDArray[np.bool_]
    """[R] outcome on the fold that neither fit nor features have seen."""
    latents: NDArray[np.int64]
    """[R] groups: rows of one latent are not independent."""
    rotations: NDArray[np.int64] | None = None
    """[R] which rotation; None where there are none."""


def confidence_features(
    fit_score: float, firings: int, atoms: int, held_out: LabelScores | None
) -> list[float]:
    """Numbers known before the test: fit, support, length, and scores on a held-out fold."""

    def of(value: float | None) -> float:
        return 0.0 if value is None else value

    if held_out is None:
        measured = [0.0, 0.0, 0.0]
    else:
        measured = [of(held_out.f1), of(held_out.precision), of(held_out.detection)]
    return [fit_score, float(np.log1p(firings)), float(atoms), *measured]


class AcceptanceRegression(ClassifierMixin, BaseEstimator):
    """p(accept) by logistic regression, the last step of a pipeline; or the share of acceptances,
    with outcomes of one kind only or fewer than MIN_ROWS rows."""

    def fit(self, x: FloatArray, y: NDArray[np.bool_]) -> Self:
        """Fit to features [R, F] and outcomes [R]."""
        self.classes_ = np.array([0, 1]).astype(y.dtype)
        self.share_ = y.mean() if y.size else 0.5
        can = y.size >= MIN_ROWS and y.any() and not y.all()
        self.regression_ = LogisticRegression(max_iter=500).fit(x, y) if can else None
        return self

    def predict_proba(self, x: FloatArray) -> FloatArray:
        """[n, 2] of rejection and acceptance."""
        if self.regression_ is not None:
            return np.asarray(self.regression_.predict_proba(x))
        return np.tile([1 - self.share_, self.share_], (len(x), 1))

    def predict(self, x: FloatArray) -> NDArray[np.bool_]:
        """[n] whether acceptance is the likelier outcome."""
        return self.predict_proba(x)[:, 1] > 0.5


class ConfidenceModel:
    """p(accept) with a confidence interval from a bootstrap over latents.

    Where no regression can be fitted every label gets the smoothed share of acceptances and its
    Wilson interval.
    """

    def __init__(self, data: Calibration, *, seed: int, resamples: int = 100) -> None:
        self.data = data
        # Scaled once, on all rows: in a resample a feature may not vary at all.
        scaler = StandardScaler()
        if len(data.features):
            scaler.fit(data.features)
        pipeline = make_pipeline(FrozenEstimator(scaler), AcceptanceRegression())
        self._model = self._fitted(pipeline, np.arange(data.accepted.size))
        rng = np.random.default_rng(seed)
        groups = np.unique(data.latents)
        resampled = []
        for _ in range(resamples if self.kind == "logistic" else 0):
            draw = rng.choice(groups, groups.size)
            rows = np.concatenate([np.flatnonzero(data.latents == group) for group in draw])
            resampled.append(self._fitted(pipeline, rows))
        self._resampled = [model for model in resampled if model[-1].regression_ is not None]

    @property
    def kind(self) -> str:
        """ "logistic", or "base_rate" where no regression could be fitted."""
        return "base_rate" if self._model[-1].regression_ is None else "logistic"

    def predict(self, features: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """p(accept) [n] and the ends of its 95 % interval, for features [n, F]."""
        if self.kind == "base_rate":
            passed, rows = int(self.data.accepted.sum()), self.data.accepted.size
            low, high = wilson_interval(passed, rows)
            p = (passed + 1) / (rows + 2)
            ones = np.ones(len(features))
            return p * ones, min(low, p) * ones, max(high, p) * ones
        if not len(features):
            return np.zeros(0), np.zeros(0), np.zeros(0)
        p, *draws = (
            model.predict_proba(features)[:, 1] for model in (self._model, *self._resampled)
        )
        low, high = np.quantile(draws or [p], [0.025, 0.975], axis=0)
        return p, np.minimum(low, p), np.maximum(high, p)

    def out_of_fold(self) -> FloatArray:
        """[R] p(accept) of each calibration row from a model that has not seen its latent."""
        x, y, groups = self.data[:3]
        folds = min(5, np.unique(groups).size)
        if self.kind == "base_rate" or folds < 2:
            return self.predict(x)[0]
        return out_of_fold(self._model, x, y, GroupKFold(folds), groups)

    def _fitted(self, pipeline: Pipeline, rows: NDArray[np.int64]) -> Pipeline:
        features, accepted = self.data.features[rows], self.data.accepted[rows]
        if not rows.size:  # the scaler knows no feature
            pipeline = pipeline[-1:]
        return clone(pipeline).fit(features, accepted)


def out_of_fold(
    pipeline: Pipeline,
    x: FloatArray,
    y: NDArray[np.bool_],
    folds: BaseCrossValidator,
    groups: NDArray[np.int64] | None = None,
) -> FloatArray:
    """[R] p(accept) of each row from a fit to the other folds."""
    p = cross_val_predict(pipeline, x, y, groups=groups, cv=folds, method="predict_proba")
    return np.asarray(p)[:, 1]


class Threshold(JsonRecord):
    """What calibration rows say of the labels with a confidence of at least `tau`."""

    tau: float
    latents: int
    """Latents with such a row: each counts once, by the mean over its rows."""
    share: float
    """Accepted share of them."""
    low: float
    """Its Wilson lower bound (95 %)."""


def thresholds(
    p: FloatArray, accepted: NDArray[np.bool_], latents: NDArray[np.int64]
) -> list[Threshold]:
    """One entry for each value of p, the largest first.

    Args:
        p: [R] out-of-fold confidences of the calibration rows.
        accepted: [R] their outcomes.
        latents: [R] the latent of each row; rows of one latent repeat each other.
    """
    _, group = np.unique(latents, return_inverse=True)
    out = []
    for tau in np.unique(p)[::-1]:
        kept = p >= tau
        rows = np.bincount(group[kept])
        passed = np.bincount(group[kept], accepted[kept])
        count = int((rows > 0).sum())
        total = float((passed[rows > 0] / rows[rows > 0]).sum())
        # Rounded down: a latent that passes in two of three rotations is no success.
        low = wilson_interval(int(total + 1e-9), count).low
        out.append(Threshold(tau=float(tau), latents=count, share=total / count, low=low))
    return out


def high_confidence_threshold(found: list[Threshold]) -> float | None:
    """The smallest tau whose lower bound is at least PRECISION_BAR, from `thresholds`.

    None if no tau will do: then no label is of high confidence.
    """
    return min((entry.tau for entry in found if entry.low >= PRECISION_BAR), default=None)


def point_threshold(found: list[Threshold]) -> float | None:
    """The smallest tau whose accepted share itself is at least PRECISION_BAR: a guess, no proof."""
    return min((entry.tau for entry in found if entry.share >= PRECISION_BAR), default=None)


class Coverage(JsonRecord):
    """How many labels a threshold takes in, and how good they are."""

    threshold: float | None
    """Least confidence; None covers nothing."""
    labels: int
    """Labels with at least that."""
    coverage: Measured
    """Of all latents, failures included, the share with such a label; Wilson interval."""
    accepted: int
    """Such labels that the `test` split accepts."""
    precision: Measured
    """Their share of `labels`; Wilson interval."""


def coverage(p: FloatArray, outcome: NDArray[np.bool_], tau: float | None) -> Coverage:
    """How many labels have p >= tau, and how many of them the test split accepts.

    Args:
        p: [K] confidences of all latents, failures with 0.
        outcome: [K] accepted on the test split; a failure is not.
        tau: the threshold; None covers nothing.
    """
    chosen = np.zeros(p.size, bool) if tau is None else (p >= tau) & (p > 0)
    size, right = int(chosen.sum()), int(outcome[chosen].sum())
    return Coverage(
        threshold=tau,
        labels=size,
        coverage=proportion(size, p.size),
        accepted=right,
        precision=proportion(right, size),
    )


class ReliabilityBin(JsonRecord):
    """Labels of about the same confidence."""

    n: int
    mean_p: float
    """Their mean confidence."""
    accepted: float
    """The share of them that was accepted."""


class Reliability(JsonRecord):
    """How confidences hold against outcomes."""

    n: int
    """Labels."""
    ece: float | None
    """Expected calibration error, 10 equal bins (1706.04599); None without labels."""
    brier: float | None
    """Mean squared difference of confidence and outcome; None without labels."""
    bins: tuple[ReliabilityBin, ...]
    """Those that hold a label."""


def reliability(p: FloatArray, outcome: NDArray[np.bool_]) -> Reliability:
    """Expected calibration error, Brier score, and the bins."""
    if p.size == 0:
        return Reliability(n=0, ece=None, brier=None, bins=())
    index = np.minimum((p * NUM_BINS).astype(int), NUM_BINS - 1)
    bins, ece = [], 0.0
    for bin_index in range(NUM_BINS):
        inside = index == bin_index
        if inside.any():
            mean_p, share = float(p[inside].mean()), float(outcome[inside].mean())
            ece += float(inside.mean()) * abs(mean_p - share)
            bins.append(ReliabilityBin(n=int(inside.sum()), mean_p=mean_p, accepted=share))
    brier = float(np.mean((p - outcome) ** 2))
    return Reliability(n=p.size, ece=ece, brier=brier, bins=tuple(bins))
