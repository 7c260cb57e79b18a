"""Held-out texts to explain: of the test split, as many and as long as asked for."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rldecoder.evals.prompts import TASKS, make_prompts
from rldecoder.explain.held_out_texts import MAX_TASK_TEXTS, task_texts, text_beginnings


class Reader:
    """Sequences 7, 8, 9 of four tokens each, in batches of three that cut them."""

    def ordered(self, batch_tokens, columns):
        assert columns == ()  # no vectors are read for text
        seq_id = torch.arange(7, 10).repeat_interleave(4)
        for rows in torch.arange(12).split(3):
            yield SimpleNamespace(seq_id=seq_id[rows], token_id=rows + 100)


LM = SimpleNamespace(
    tokenizer=SimpleNamespace(decode=lambda row, skip_special_tokens: " ".join(map(str, row)))
)


def test_beginnings_are_joined_over_batches_and_cut_to_length():
    assert text_beginnings(LM, Reader(), 2, 3) == ["100 101 102", "104 105 106"]
    # The second sequence ends in the batch that begins the third.
    assert text_beginnings(LM, Reader(), 2, 4) == ["100 101 102 103", "104 105 106 107"]
    assert len(text_beginnings(LM, Reader(), 5, 9)) == 3  # what there is


def test_task_texts_are_test_prompts_of_every_task():
    texts = task_texts(MAX_TASK_TEXTS, 3)
    assert len(set(texts)) == MAX_TASK_TEXTS * len(TASKS)
    for task in TASKS:
        assert {prompt.prompt for prompt in make_prompts(task, "test", 5, 3)} <= set(texts)
        assert not {prompt.prompt for prompt in make_prompts(task, "train", 40, 3)} & set(texts)
