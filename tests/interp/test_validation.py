from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from rldecoder.evals.statistics import Measured
from rldecoder.interp.importance import PatchBatch, Subject
from rldecoder.interp.validation import (
    Ablation,
    TargetValidation,
    agreement,
    choose_estimator,
    choose_latents,
    effects_of,
    validate,
)


def test_choice_takes_the_top_and_one_of_each_stratum() -> None:
    importance = np.array([0, 5, -9, 1, 2, 0, 3, -4, 6, 7.0])
    chosen = choose_latents(importance, 3, 2, np.random.default_rng(0))
    assert chosen[:3].tolist() == [2, 9, 8]
    assert len(set(chosen.tolist())) == 5
    assert chosen[3] in (1, 7, 6)
    assert chosen[4] in (4, 3)
    everything = choose_latents(importance, 50, 50, np.random.default_rng(0))
    assert sorted(everything.tolist()) == [1, 2, 3, 4, 6, 7, 8, 9]


def test_agreement_of_perfect_reversed_and_unrelated_estimates() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=80)
    perfect = agreement(2 * exact, exact)
    for name in ("spearman", "recall_at_10", "sign_agreement"):
        assert getattr(perfect, name).value == pytest.approx(1.0)
    flipped = agreement(-exact, exact)
    assert flipped.spearman.value == pytest.approx(-1.0)
    assert flipped.sign_agreement.value == 0.0
    assert flipped.recall_at_10.value == 1.0
    noise = agreement(rng.normal(size=80), exact)
    assert noise.spearman.low < 0.1
    assert noise.spearman.low <= noise.spearman.value <= noise.spearman.high


def test_spearman_equals_scipy() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    a = rng.integers(0, 6, 40).astype(float)
    b = a + rng.normal(size=40)
    expected = spearmanr(a, b).statistic
    assert agreement(a, b, resamples=5).spearman.value == pytest.approx(expected)


def test_undefined_agreement_is_none() -> None:
    found = agreement(np.zeros(0), np.zeros(0))
    assert found.spearman == Measured(value=None, low=None, high=None)


def test_attribution_patching_agrees_with_exact_ablation(
    subject: Subject, batch: PatchBatch
) -> None:
    ablation = Ablation(subject.metric("frozen"), [batch])

    def measure(**arguments: Any) -> TargetValidation:
        return validate(
            ablation,
            subject.sae.num_latents,
            partial(effects_of, ablation, **arguments),
            num_top=15,
            num_others=15,
            integrated_steps=4,
            seed=0,
        )

    calls: list[list[float]] = []
    found = measure(on_exact=lambda values: calls.append(list(values)))
    assert found.num_latents == 30 == len(calls) == len(found.exact)
    # Taken up after 20 of them, it measures the other 10 and ends the same.
    later: list[list[float]] = []
    resumed = measure(known=calls[19], on_exact=lambda values: later.append(list(values)))
    assert len(later) == 10
    assert resumed == found
    for name in ("attribution_patching", "integrated_gradients"):
        assert found.estimators[name].spearman.value > 0.8
        assert found.estimators[name].sign_agreement.value > 0.8
    # Against another model's effects the same estimates must not agree.
    wrong = agreement(np.array(found.attribution_patching), np.roll(found.exact, 7))
    assert wrong.spearman.value < 0.5


@pytest.mark.parametrize(
    ("cheap", "integrated", "chosen", "reached"),
    [
        (0.95, 0.99, "attribution_patching", True),
        (0.85, 0.95, "integrated_gradients", True),
        (0.6, 0.7, "integrated_gradients", False),
        (0.7, 0.6, "attribution_patching", False),
        (None, None, "attribution_patching", False),
    ],
)
def test_integrated_gradients_are_the_fallback(
    cheap: float | None, integrated: float | None, chosen: str, reached: bool
) -> None:
    spearman = {"attribution_patching": cheap, "integrated_gradients": integrated}
    found = choose_estimator(spearman)
    assert (found.estimator, found.reached) == (chosen, reached)
    assert ("fallback" in found.reason) == (chosen == "integrated_gradients")
    forced = choose_estimator(spearman, "attribution_patching")
    assert forced.estimator == "attribution_patching"
    assert "set by the config" in forced.reason
