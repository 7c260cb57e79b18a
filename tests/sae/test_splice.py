"""Splice metrics against FrozenLM.splice and plain softmaxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.splice import SpliceQuality, SpliceReport, splice_quality

LAYER = 2


@pytest.fixture(scope="module")
def input_ids(lm: FrozenLM) -> Tensor:
    return torch.randint(0, lm.vocab_size, (5, 12), generator=torch.Generator().manual_seed(0))


def test_metrics_are_the_definition(lm: FrozenLM, input_ids: Tensor) -> None:
    """Recomputed by the model's own splice on whole sequences, positions 1 and later only."""

    def halve(resid: Tensor) -> Tensor:
        return resid * 0.5

    def halve_all_but_first(resid: Tensor) -> Tensor:
        return torch.cat([resid[:, :1], resid[:, 1:] * 0.5], dim=1)

    done: list[int] = []
    report = splice_quality(lm, input_ids, LAYER, {"half": halve}, batch=2, advance=done.append)
    final = lm.splice(input_ids, LAYER, halve_all_but_first)
    spliced = F.log_softmax(lm.unembed(final), -1)[:, 1:]
    frozen = F.log_softmax(lm.model(input_ids).logits, -1)[:, 1:]
    kl = (frozen.exp() * (frozen - spliced)).sum(-1)
    target = input_ids[:, 2:, None]
    half = report.replaced["half"]
    assert half.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert half.ce == pytest.approx(float(-spliced[:, :-1].gather(-1, target).mean()), rel=1e-4)
    assert report.frozen_ce == pytest.approx(
        float(-frozen[:, :-1].gather(-1, target).mean()), rel=1e-4
    )
    same = (frozen.argmax(-1) == spliced.argmax(-1)).float().mean()
    assert half.agreement == pytest.approx(float(same))
    assert report.num_tokens == 5 * 11
    assert done == [2, 2, 1]


def test_identity_costs_nothing_and_ablation_does(lm: FrozenLM, input_ids: Tensor) -> None:
    report = splice_quality(lm, input_ids, LAYER, {"same": lambda r: r, "zero": torch.zeros_like})
    same, zero = report.replaced["same"], report.replaced["zero"]
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.ce == pytest.approx(report.frozen_ce, rel=1e-6)
    assert same.agreement == 1.0
    assert zero.kl > 1e-3


def test_ce_recovered() -> None:
    report = SpliceReport(
        3.0,
        {
            "sae": SpliceQuality(0.1, 3.5, 0.9),
            "zero": SpliceQuality(5.0, 8.0, 0.1),
            "mean": SpliceQuality(0.0, 3.0, 1.0),
        },
        10,
    )
    assert report.ce_recovered("sae", "zero") == pytest.approx(0.9)
    assert report.ce_recovered("sae", "mean") is None


def test_short_sequences_are_refused(lm: FrozenLM) -> None:
    with pytest.raises(BadInputError, match="3 tokens"):
        splice_quality(lm, torch.zeros(2, 2, dtype=torch.int64), LAYER, {})
