"""The verdict's arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.faithfulness import decoder_predictor, evaluate_faithfulness
from rldecoder.evals.prompts import make_prompts
from rldecoder.evals.tasks import TaskRow, summarise
from rldecoder.rl.controls import (
    System,
    compare,
    control_rows,
    sequence_kl,
    uniform_policy,
    uniform_predictor,
)


def system(name: str, scores: list[float], kl: list[float], gates: bool = False) -> System:
    rows = [TaskRow("cloze", i, "box", "", score) for i, score in enumerate(scores)]
    return System(name, summarise(rows), np.array(kl), gates)


GOOD, BAD = [1.0] * 18 + [0.0] * 2, [0.0] * 18 + [1.0] * 2
LOW, HIGH = [0.3 + 0.01 * i for i in range(10)], [1.3 + 0.02 * i for i in range(10)]


@pytest.mark.parametrize(
    ("trained", "control", "beaten"),
    [
        ((GOOD, LOW), (BAD, HIGH), True),
        ((GOOD, LOW), (GOOD, HIGH), True),  # better text, same tasks
        ((GOOD, LOW), (BAD, LOW), True),
        ((GOOD, LOW), (GOOD, LOW), False),  # the same
        ((GOOD, HIGH), (BAD, LOW), False),  # better on one, worse on the other
        ((BAD, HIGH), (GOOD, LOW), False),
    ],
)
def test_a_control_is_beaten_clearly_or_not_at_all(trained, control, beaten):
    found = compare(system("trained", *trained), system("random", *control), seed=0)
    assert found.beaten is beaten
    assert found.score_low <= found.score_difference <= found.score_high
    assert found.kl_low <= found.kl_difference <= found.kl_high
    assert "control random comes near" in found.reason()
    assert found.kl_difference == pytest.approx(np.mean(control[1]) - np.mean(trained[1]))


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
    rows = control_rows(system("random", GOOD, LOW, gates=True), seed=0)
    assert [row["task"] for row in rows] == ["all", "cloze"]
    assert all(row["gates"] for row in rows)
    assert rows[0]["kl_low"] <= rows[0]["kl"] <= rows[0]["kl_high"]
    assert torch.isfinite(torch.tensor([rows[0][k] for k in ("kl", "kl_low", "score_low")])).all()
