"""The freeze decision at and around its bounds."""

from __future__ import annotations

import pytest

from rldecoder.config.rl import FreezeDecoderConfig
from rldecoder.evals.statistics import Measured
from rldecoder.rl.freeze import OnTest, decide

CONFIG = FreezeDecoderConfig()
SUPERVISED = OnTest(kl=0.6, task_score=0.7)


def found(ppo: OnTest, control: str | None = "pass"):
    return decide(
        ppo, SUPERVISED, 0.8, control_verdict=control, judged_by="controls", config=CONFIG
    )


def test_frozen_when_everything_holds():
    decision = found(OnTest(0.49, 0.79))
    assert decision.frozen
    assert decision.which == "ppo"
    assert decision.reasons == ()
    assert decision.task_drop == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("ppo", "control", "word"),
    [
        (OnTest(0.5, 0.8), "pass", "held-out KL"),
        (OnTest(0.4, 0.76), "pass", "task score"),
        (OnTest(0.4, 0.8), "fail", "controls"),
        (OnTest(0.4, 0.8), None, "controls"),
    ],
)
def test_one_reason_each(ppo, control, word):
    decision = found(ppo, control)
    assert not decision.frozen
    assert decision.which == "ppo"
    assert len(decision.reasons) == 1
    assert word in decision.reasons[0]


def test_a_ppo_decoder_that_lost_faithfulness_is_passed_over():
    decision = found(OnTest(0.66, 0.9))
    assert decision.which == "supervised"
    assert not decision.frozen
    assert decision.kl == SUPERVISED.kl
    assert decision.task_drop == pytest.approx(0.1)
    assert "supervised decoder is published instead" in decision.reasons[0]
    assert found(OnTest(0.64, 0.9)).which == "ppo"


def test_a_better_task_score_than_the_frozen_model_is_no_drop():
    assert found(OnTest(0.4, 0.95)).frozen


def test_the_drop_has_its_interval_which_decides_nothing():
    """Of the decoder that is published."""
    wide = Measured(value=0.01, low=-0.08, high=0.1)
    decision = found(OnTest(0.4, 0.79, wide))
    assert decision.frozen
    assert (decision.task_drop_low, decision.task_drop_high) == (-0.08, 0.1)
    assert decision.drop_in_words() == "-0.01 [-0.10, +0.08] more than the frozen model"
    passed_over = found(OnTest(0.66, 0.9, wide))
    assert passed_over.task_drop_low is None
    assert passed_over.drop_in_words() == "-0.10 more than the frozen model"
