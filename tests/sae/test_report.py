"""Bounds, targets and verdict sentences of the QA report."""

from __future__ import annotations

import torch

from rldecoder.config.sae import GateSaeConfig
from rldecoder.gates import Band
from rldecoder.sae.metrics import ReconstructionQuality, Usage
from rldecoder.sae.report import failures, make_report
from rldecoder.sae.splice import SpliceQuality, SpliceReport

QUALITY = ReconstructionQuality(
    fvu=0.2,
    normalised_mse=0.008,
    mse=3.0,
    cosine=0.9,
    l0_mean=64.0,
    l0_percentiles=(60.0, 64.0, 64.0),
    density=torch.tensor([0.1, 0.2, 0.0, 0.3], dtype=torch.float64),
    num_tokens=100,
)
SPLICE = SpliceReport(
    3.0,
    {
        "sae": SpliceQuality(0.3, 3.3, 0.8),
        "zero": SpliceQuality(5.0, 9.0, 0.1),
        "mean": SpliceQuality(4.0, 3.0, 0.1),
        "random": SpliceQuality(2.0, 5.0, 0.3),
    },
    50,
)
USAGE = Usage(1.0, 0.7, 2.7)


def test_bands() -> None:
    assert Band(None, 0.5).holds(0.49)
    assert not Band(None, 0.5).holds(0.5)
    assert Band(50.0, 100.0, inclusive=True).holds(50.0)
    assert not Band(50.0, 100.0, inclusive=True).holds(100.1)
    assert not Band(0.95, None).holds(None)
    assert not Band(0.95, None).holds(float("nan"))
    assert [str(b) for b in (Band(None, 0.5), Band(0.9, None), Band(1.0, 2.0))] == [
        "below 0.5",
        "above 0.9",
        "1 to 2",
    ]


def test_a_lowered_threshold_shows_both() -> None:
    """A profile that asks for less passes its own gate; the plan's target still says not met."""
    config = GateSaeConfig(min_explained_variance=0.7, max_dead_fraction=0.3)
    report = make_report(QUALITY, USAGE, 0.0, SPLICE, QUALITY, config)
    entry = report["explained_variance"]
    assert (entry.target, entry.met) == (0.95, False)
    assert (entry.threshold, entry.passed) == (0.7, True)
    assert report.rows()["l0_mean"]["target"] == [50.0, 100.0]
    assert failures(report, config) == ()


def test_every_missed_threshold_has_its_sentence() -> None:
    config = GateSaeConfig()
    report = make_report(QUALITY, USAGE, 0.2, SPLICE, None, config)
    reasons = failures(report, config)
    assert len(reasons) == 3
    assert "explained_variance is 0.8 on the test split; the gate asks for above 0.95" in reasons[0]
    assert "dead_fraction is 0.25" in reasons[1]
    assert "near_duplicate_fraction" in reasons[2]


def test_entries_are_complete_and_json() -> None:
    report = make_report(QUALITY, USAGE, 0.0, SPLICE, QUALITY, GateSaeConfig())
    for entry in report.rows().values():
        assert {"value", "target", "met", "unit", "formula"} <= entry.keys()
    assert report["ce_recovered_zero"].value == (9.0 - 3.3) / 6.0
    assert report["ce_recovered_mean"].value is None
    assert report["random_splice_kl"].value == 2.0
    nan = make_report(
        QUALITY._replace(cosine=float("nan")), USAGE, 0.0, SPLICE, None, GateSaeConfig()
    )
    assert nan["cosine"].value is None
