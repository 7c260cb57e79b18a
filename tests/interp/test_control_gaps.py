"""Gaps to the controls: like against like, and intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from rldecoder.interp.control_gaps import control_gaps, mean_intervals
from rldecoder.interp.labelers import LabelDraft
from rldecoder.interp.labelling import Labelled
from rldecoder.interp.predicate import TokenClass
from rldecoder.interp.scores import LabelScores


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
    gap = control_gaps(methods)["label_shuffled"]["f1"]
    # Unpaired, the spread of the latents would hide a difference that each of them has.
    assert gap["difference"] == pytest.approx(0.1)
    assert gap["high"] - gap["low"] < 1e-9
    assert gap["latents"] == gap["control_latents"] == 200  # failures have no shuffled label


def test_a_gap_between_saes_counts_failures_and_also_leaves_them_out() -> None:
    trained, random = labelled([0.8] * 60, failed=40), labelled([0.8] * 20, failed=80, first=7)
    methods = {"label": trained, "shuffled": trained, "drawn": trained, "random_sae": random}
    gaps = control_gaps(methods)
    assert gaps["drawn_random_sae"] == gaps["label_random_sae"]
    with_failures = gaps["drawn_random_sae"]["detection"]
    assert with_failures["difference"] == pytest.approx(0.8 * 0.4)
    assert with_failures["low"] > 0.2
    assert with_failures["high"] < 0.45
    without = gaps["drawn_random_sae"]["detection_labelled"]
    assert (without.pop("latents"), without.pop("control_latents")) == (60, 20)
    assert list(without.values()) == pytest.approx([0, 0, 0])
    low, high = mean_intervals(trained)["interval_f1"] or []
    assert low < 0.48 < high


def test_without_scores_there_is_no_gap() -> None:
    some, none = labelled([0.5, None]), labelled([None])
    methods = {"label": some, "shuffled": none, "drawn": some, "random_sae": none}
    gaps = control_gaps(methods)
    assert all(gap is None for found in gaps.values() for gap in found.values())
    assert mean_intervals(none) == {"interval_detection": None, "interval_f1": None}
    gaps = control_gaps({**methods, "random_sae": some})
    assert gaps["drawn_random_sae"]["f1"]["latents"] == 1  # undefined scores are left out
