from __future__ import annotations

import numpy as np
import pytest

from rldecoder.evals.statistics import Measured, wilson_interval
from rldecoder.interp.calibration import (
    Acceptance,
    Calibration,
    ConfidenceModel,
    confidence_features,
    coverage,
    high_confidence_threshold,
    point_threshold,
    reliability,
    thresholds,
)
from rldecoder.interp.scores import LabelScores

SCORES = LabelScores(
    firings=30, precision=0.6, recall=0.5, f1=0.55, auprc=0.4, base_rate=0.01, detection=0.85,
    detection_positive=20, detection_negative=20, fuzzing=0.9, fuzzing_windows=12,
)  # fmt: skip


def test_acceptance_needs_both_bars() -> None:
    rule = Acceptance(detection=0.8, precision=0.5)
    assert rule.accepts(SCORES)
    assert not rule.accepts(SCORES.model_copy(update={"detection": 0.79}))
    assert not rule.accepts(SCORES.model_copy(update={"precision": 0.49}))
    assert not rule.accepts(SCORES.model_copy(update={"detection": None}))
    assert not rule.accepts(None)


def test_features_of_a_label_that_was_never_measured_are_zero() -> None:
    assert confidence_features(0.5, 0, 2, None) == [0.5, 0.0, 2.0, 0.0, 0.0, 0.0]
    assert confidence_features(0.5, 0, 2, SCORES)[3:] == [0.55, 0.6, 0.85]


def _world(rows: int, seed: int) -> Calibration:
    """Acceptance depends on the first feature with probability sigmoid(3 x)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6))
    accepted = rng.random(rows) < 1 / (1 + np.exp(-3 * x[:, 0]))
    return Calibration(x, accepted, np.arange(rows) // 3)


def test_confidence_is_calibrated_on_unseen_rows() -> None:
    model = ConfidenceModel(_world(900, 0), seed=0, resamples=20)
    unseen = _world(3000, 1)
    p, low, high = model.predict(unseen.features)
    found = reliability(p, unseen.accepted)
    assert found.ece < 0.05
    assert found.brier < 0.18
    assert (low <= p).all()
    assert (p <= high).all()
    assert (high - low).mean() > 0.01
    constant = reliability(np.full(3000, 0.99), unseen.accepted)
    assert constant.ece > 0.3


def test_out_of_fold_predictions_do_not_use_the_latents_own_rows() -> None:
    # Each latent has its own random level: rows of one latent predict each other perfectly.
    rng = np.random.default_rng(0)
    latents = np.repeat(np.arange(40), 3)
    level = rng.integers(0, 2, 40)
    features = np.eye(40)[latents]
    data = Calibration(features, level[latents].astype(bool), latents)
    model = ConfidenceModel(data, seed=0, resamples=2)
    fitted = ((model.predict(features)[0] > 0.5) == data.accepted).mean()
    honest = ((model.out_of_fold() > 0.5) == data.accepted).mean()
    assert fitted == 1.0
    assert honest < 0.75


def test_base_rate_when_nothing_can_be_fitted() -> None:
    data = Calibration(np.zeros((12, 6)), np.ones(12, bool), np.arange(12))
    model = ConfidenceModel(data, seed=0)
    assert model.kind == "base_rate"
    p, low, high = model.predict(np.zeros((2, 6)))
    assert p.tolist() == pytest.approx([13 / 14] * 2)
    assert low[0] == pytest.approx(wilson_interval(12, 12).low)
    assert high[0] == 1.0
    empty = ConfidenceModel(
        Calibration(np.zeros((0, 6)), np.zeros(0, bool), np.zeros(0, int)), seed=0
    )
    assert empty.predict(np.zeros((1, 6)))[0].tolist() == [0.5]
    assert empty.out_of_fold().size == 0


def test_threshold_is_the_smallest_safe_one() -> None:
    p = np.linspace(0, 1, 300)
    accepted = p > 0.4
    found = thresholds(p, accepted, np.arange(300))
    tau = high_confidence_threshold(found)
    assert tau is not None

    def safe(threshold: float) -> bool:
        kept = accepted[p >= threshold]
        return wilson_interval(int(kept.sum()), kept.size).low >= 0.8

    assert safe(tau)
    assert not any(safe(value) for value in p[p < tau])
    assert tau < 0.4
    point = point_threshold(found)
    assert point is not None
    assert point < tau
    assert accepted[p >= point].mean() >= 0.8
    assert [entry.tau for entry in found] == sorted(p, reverse=True)


def test_no_threshold_when_nothing_is_safe_or_too_few_latents() -> None:
    p = np.linspace(0, 1, 300)
    nothing = thresholds(p, np.zeros(300, bool), np.arange(300))
    assert high_confidence_threshold(nothing) is None
    assert point_threshold(nothing) is None
    few, p = np.ones(20, bool), np.linspace(0, 1, 20)
    assert high_confidence_threshold(thresholds(p, few, np.arange(20))) is not None
    # The same rows, but of seven latents.
    shared = thresholds(p, few, np.arange(20) % 7)
    assert high_confidence_threshold(shared) is None
    assert shared[-1].latents == 7
    assert point_threshold(shared) == 0.0
    assert thresholds(np.zeros(0), np.zeros(0, bool), np.zeros(0, int)) == []


def test_latents_count_once_by_the_mean_of_their_rows_above_the_threshold() -> None:
    # Latent 0 passes in one of two rows; latent 1 in all three; latent 2 lies below.
    p = np.array([0.9, 0.9, 0.8, 0.8, 0.8, 0.1])
    accepted = np.array([True, False, True, True, True, False])
    first, second, last = thresholds(p, accepted, np.array([0, 0, 1, 1, 1, 2]))
    assert (first.tau, first.latents, first.share) == (0.9, 1, 0.5)
    assert (second.tau, second.latents, second.share) == (0.8, 2, 0.75)
    assert second.low == pytest.approx(wilson_interval(1, 2).low)
    assert (last.tau, last.latents, last.share) == (0.1, 3, 0.5)


def test_coverage_counts_all_latents_and_judges_on_the_test_split() -> None:
    p = np.array([0.9, 0.8, 0.7, 0.2, 0.0])
    outcome = np.array([True, False, True, True, False])
    found = coverage(p, outcome, 0.7)
    assert found.labels == 3
    assert found.coverage.value == pytest.approx(0.6)
    assert found.precision.value == pytest.approx(2 / 3)
    assert found.precision.low == pytest.approx(wilson_interval(2, 3).low)
    everything = coverage(p, outcome, 0.0)
    assert everything.labels == 4  # a failure has p = 0
    nothing = coverage(p, outcome, None)
    assert nothing.labels == 0
    assert nothing.precision == Measured(value=None, low=0.0, high=1.0)


def test_reliability_by_hand() -> None:
    p = np.array([0.05, 0.95, 0.95, 1.0])
    outcome = np.array([False, True, False, True])
    found = reliability(p, outcome)
    mean = (0.95 + 0.95 + 1.0) / 3
    assert found.ece == pytest.approx(0.25 * 0.05 + 0.75 * abs(mean - 2 / 3))
    assert found.brier == pytest.approx(np.mean((p - outcome) ** 2))
    assert [b.n for b in found.bins] == [1, 3]
    assert reliability(np.zeros(0), np.zeros(0, bool)).ece is None
