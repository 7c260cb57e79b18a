"""Gaps to the controls: like against like, and intervals that hold what they promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rldecoder.interp.control_gaps import ScoreSummary, control_gaps
from rldecoder.interp.labelers import LabelDraft
from rldecoder.interp.labelling import Labelled
from rldecoder.interp.predicate import TokenClass
from rldecoder.interp.scores import LabelScores
from rldecoder.schemas import read_json


def labelled(values: list[float | None], failed: int = 0, first: int = 0) -> Labelled:
    """Latents whose detection and F1 are the values, and some without a label."""
    drafts, scores = [], []
    for n, value in enumerate([*values, *[0.0] * failed]):
        good = n < len(values)
        predicate = TokenClass(name="number") if good else None
        drafts.append(
            LabelDraft(first + n, "x" if good else None, predicate, None if good else "rare", 9, 0)
        )
        scores.append(LabelScores(9, 0.5, 0.5, value, 0.5, 0.1, value, 5, 5, value, 5))
    return Labelled(drafts, scores)


def test_shuffled_labels_are_compared_latent_by_latent() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.9, 200)
    own = labelled((base + 0.1).tolist(), failed=50)
    methods = {"label": own, "shuffled": labelled(base.tolist()), "drawn": own, "random_sae": own}
    gap = control_gaps(methods).label_shuffled["f1"]
    # Unpaired, the spread of the latents would hide a difference that each of them has.
    assert gap.difference == pytest.approx(0.1)
    assert gap.high - gap.low < 1e-9
    assert gap.latents == gap.control_latents == 200  # failures have no shuffled label


def test_a_gap_between_saes_counts_failures_and_also_leaves_them_out() -> None:
    trained, random = labelled([0.8] * 60, failed=40), labelled([0.8] * 20, failed=80, first=7)
    methods = {"label": trained, "shuffled": trained, "drawn": trained, "random_sae": random}
    gaps = control_gaps(methods)
    assert gaps.drawn_random_sae == gaps.label_random_sae
    with_failures = gaps.drawn_random_sae["detection"]
    assert with_failures.difference == pytest.approx(0.8 * 0.4)
    assert with_failures.low > 0.2
    assert with_failures.high < 0.45
    without = gaps.drawn_random_sae["detection_labelled"]
    assert (without.latents, without.control_latents) == (60, 20)
    assert [without.difference, without.low, without.high] == pytest.approx([0, 0, 0])
    low, high = ScoreSummary.of(trained, ["f1"], ["f1"]).intervals["f1"]
    assert low < 0.48 < high


def test_without_scores_there_is_no_gap() -> None:
    some, none = labelled([0.5, None]), labelled([None])
    methods = {"label": some, "shuffled": none, "drawn": some, "random_sae": none}
    gaps = control_gaps(methods)
    for found in (gaps.label_shuffled, gaps.label_random_sae, gaps.drawn_random_sae):
        assert set(found.values()) == {None}
    assert ScoreSummary.of(none, ["f1"], ["f1"]).intervals == {"f1": None}
    gaps = control_gaps({**methods, "random_sae": some})
    assert gaps.drawn_random_sae["f1"].latents == 1  # undefined scores are left out


def test_a_summary_lies_flat_in_json_and_is_read_back(tmp_path: Path) -> None:
    written = ScoreSummary.of(labelled([0.5, 0.7], failed=2), ["f1", "detection_hard"], ["f1"])
    written.save(tmp_path / "summary.json")
    raw = read_json(tmp_path / "summary.json")
    assert (raw["latents"], raw["labelled"], raw["failed"]) == (4, 2, 2)
    assert raw["mean_f1"] == pytest.approx(0.3)
    assert raw["mean_f1_labelled"] == pytest.approx(0.6)
    assert raw["mean_detection_hard"] is raw["mean_detection_hard_labelled"] is None
    assert raw["interval_f1"] == list(written.intervals["f1"])
    assert ScoreSummary.load(tmp_path / "summary.json") == written


def test_what_was_not_asked_for_is_absent_in_json(tmp_path: Path) -> None:
    gaps = control_gaps({"label": labelled([0.5]), "shuffled": labelled([0.4])})
    gaps.save(tmp_path / "gaps.json")
    assert set(read_json(tmp_path / "gaps.json")) == {"label_shuffled"}
    assert type(gaps).load(tmp_path / "gaps.json") == gaps
