"""The verdict's arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.faithfulness import decoder_predictor, evaluate_faithfulness
from rldecoder.evals.prompts import make_prompts
from rldecoder.evals.statistics import wilson_interval
from rldecoder.evals.tasks import TaskRow, summarise
from rldecoder.rl.controls import (
    System,
    compare,
    control_rows,
    each_training,
    sequence_kl,
    uniform_policy,
    uniform_predictor,
)


def system(
    name: str, scores: list[list[float]], kl: list[list[float]], gates: bool = False
) -> System:
    """One list a training."""
    tasks = [
        summarise(TaskRow("cloze", i, "box", "", score) for i, score in enumerate(row))
        for row in scores
    ]
    return System(name, tasks, np.array(kl), gates)


GOOD, BAD = [1.0] * 18 + [0.0] * 2, [0.0] * 18 + [1.0] * 2
LOW, HIGH = [0.3 + 0.01 * i for i in range(10)], [1.3 + 0.02 * i for i in range(10)]


@pytest.mark.parametrize(
    ("trained", "control", "beaten"),
    [
        ((GOOD, LOW), (BAD, HIGH), True),
        ((GOOD, LOW), (BAD, LOW), True),
        ((GOOD, HIGH), (BAD, LOW), True),  # the rise of KL has its own bound
        ((GOOD, LOW), (GOOD, HIGH), False),  # better text alone is not what the reward is for
        ((GOOD, LOW), (GOOD, LOW), False),
        ((BAD, HIGH), (GOOD, LOW), False),
    ],
)
def test_a_control_is_beaten_on_the_task_or_not_at_all(trained, control, beaten):
    one, other = (
        system(name, [scores], [kl])
        for name, (scores, kl) in (("trained", trained), ("random", control))
    )
    found = compare(one, other, seed=0)
    assert found.beaten is beaten
    assert found.beaten == (found.score_pvalue < 0.025)
    assert found.score_low <= found.score_difference <= found.score_high
    assert found.kl_low <= found.kl_difference <= found.kl_high
    assert "control random comes near" in found.reason()
    assert found.kl_difference == pytest.approx(np.mean(control[1]) - np.mean(trained[1]))


def test_trainings_that_disagree_widen_the_interval():
    start = system("supervised", [[0.0] * 20], [HIGH])
    agree = system("trained", [[1.0] * 10 + [0.0] * 10] * 3, [LOW] * 3)
    differ = system("trained", [[1.0] * 20, [1.0] * 10 + [0.0] * 10, [0.0] * 20], [LOW] * 3)
    alike, apart = (compare(trained, start, seed=0) for trained in (agree, differ))
    assert alike.score_difference == apart.score_difference == 0.5
    assert alike.score_high - alike.score_low < apart.score_high - apart.score_low
    assert alike.beaten
    assert not apart.beaten


def test_every_training_is_judged_against_the_controls_of_its_own_seed():
    trained = system("trained", [[1.0] * 20, [1.0] * 20, [0.0] * 20], [LOW, HIGH, LOW])
    noise = system("random", [[0.0] * 20, [1.0] * 20, [0.0] * 20], [LOW] * 3, gates=True)
    uniform = system("uniform", [[0.0] * 20], [LOW], gates=True)
    beside = system("losses_only", [[1.0] * 20] * 3, [LOW] * 3)
    frozen = system("frozen", [[1.0] * 15 + [0.0] * 5], [LOW])
    found = each_training(trained, [noise, uniform, beside, trained], frozen, seed=0)
    assert [one.not_beaten for one in found] == [(), ("random",), ("random", "uniform")]
    assert [one.score for one in found] == [1.0, 1.0, 0.0]
    assert found[0].kl == pytest.approx(np.mean(LOW))
    assert found[1].kl == pytest.approx(np.mean(HIGH))
    # The frozen model answers 15 of 20: ahead of it where all are right, and far behind at none.
    ahead, _, behind = (one.drop for one in found)
    assert ahead is not None
    assert behind is not None
    assert (ahead.value, behind.value) == (-0.25, 0.75)
    assert ahead.low < -0.25 < ahead.high <= 0
    assert behind.low < 0.75 < behind.high <= 1


def grouped(name: str, scores: list[float], size: int) -> System:
    """Prompts in groups of `size`."""
    rows = [
        TaskRow("addition", i, "3", "", score, f"{i // size}") for i, score in enumerate(scores)
    ]
    return System(name, [summarise(rows)], np.array([LOW]))


def test_wordings_of_one_question_are_not_independent():
    scores, zeros = [1.0] * 8 + [0.0] * 16 + [1.0] * 8, [0.0] * 32
    alone, four = (
        compare(grouped("trained", scores, size), grouped("start", zeros, size), seed=0)
        for size in (1, 4)
    )
    assert alone.score_difference == four.score_difference == 0.5
    ratio = (four.score_high - four.score_low) / (alone.score_high - alone.score_low)
    assert 1.6 < ratio < 2.4  # sqrt(4) of the closed form; eight groups make it coarse
    (everything, of_task) = control_rows(grouped("trained", scores, 4), seed=0)
    assert everything.score_low == of_task.score_low == pytest.approx(four.score_low)
    none_right = control_rows(grouped("start", zeros, 4), seed=0)[0]
    assert none_right.score_high == wilson_interval(0, 8).high
    each_alone = control_rows(grouped("trained", scores, 1), seed=0)[0]
    assert each_alone.score_low == wilson_interval(16, 32).low


def test_sequence_kl_averages_to_the_evaluation(make_decoder, tiny_cache):
    decoder = make_decoder(scale=0.05)
    lm = decoder.frozen.lm
    reader = ActivationReader(tiny_cache, "test")
    predictors = {"decoder": decoder_predictor(decoder), "uniform": uniform_predictor(lm)}
    found = sequence_kl(predictors, reader, lm, num_tokens=75)
    assert found["decoder"].shape == (5,)  # 15 rows a sequence
    expected = evaluate_faithfulness(decoder, reader, max_tokens=75).kl
    assert found["decoder"].mean() == pytest.approx(expected, rel=1e-5)
    batch = next(reader.ordered(75, columns=("final_hidden",), max_tokens=75))
    logprobs = lm.unembed(batch.final_hidden).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    assert found["uniform"].mean() == pytest.approx(
        math.log(lm.vocab_size) - float(entropy), rel=1e-4
    )


def test_uniform_policy_is_seeded_noise(make_decoder):
    lm = make_decoder().frozen.lm
    prompts = make_prompts("addition", "test", 5, 0)
    one = uniform_policy(prompts, lm, seed=0)
    assert one == uniform_policy(prompts, lm, seed=0)
    assert one != uniform_policy(prompts, lm, seed=1)
    assert one.n == 5
    assert one.score == 0.0


def test_rows_for_each_task():
    rows = control_rows(system("random", [GOOD], [LOW], gates=True), seed=0)
    assert [row.task for row in rows] == ["all", "cloze"]
    assert all(row.gates for row in rows)
    assert rows[0].kl_low <= rows[0].kl <= rows[0].kl_high
    assert all(math.isfinite(x) for x in (rows[0].kl, rows[0].kl_low, rows[0].score_low))


def test_rows_of_several_trainings():
    several = system("random", [GOOD, BAD, GOOD], [LOW, LOW, HIGH])
    (everything, _) = control_rows(several, seed=0)
    assert everything.num_trainings == 3
    assert everything.num_prompts == 20
    assert everything.score == pytest.approx((0.9 + 0.1 + 0.9) / 3)
    assert everything.score_low < everything.score < everything.score_high
