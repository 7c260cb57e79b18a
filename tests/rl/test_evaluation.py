"""Evaluations: rows, splits, and prompts that do not fit."""

from __future__ import annotations

import pytest

from rldecoder.evals.suite import TaskSuite
from rldecoder.rl.core import RewardWeights
from rldecoder.rl.evaluation import Evaluator


@pytest.mark.parametrize("split", ["validation", "test"])
def test_prompts_and_text_are_of_one_split(make_decoder, tiny_cache, split):
    decoder = make_decoder()
    evaluator = Evaluator(
        decoder.frozen.lm, tiny_cache, split=split,
        suite=TaskSuite(("cloze",), (), decoder.frozen.lm), num_prompts=3, num_tokens=30, seed=0,
    )  # fmt: skip
    assert {prompt.split for prompt in evaluator.prompts} == {split}
    assert evaluator.reader.split == split
    found = evaluator(decoder)
    assert found.text.num_tokens == 30
    rows = found.rows(4, 2, RewardWeights(0.5, 0.3, 0.2))
    assert [row.task for row in rows] == ["all", "cloze"]
    assert rows[0].kl == found.text.kl
    assert rows[0].score_low <= rows[0].score <= rows[0].score_high
    assert (rows[0].step, rows[0].stage, rows[0].task_weight) == (4, 2, 0.2)
