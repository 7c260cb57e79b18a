"""Choices between words: disjoint splits, balanced answers, answers that score."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from rldecoder.config.tasks import TaskName
from rldecoder.errors import BadInputError
from rldecoder.evals.choices import MAX_NEW_TOKENS
from rldecoder.evals.prompts import CHOICES, SPLITS, TASKS, TaskPrompt, make_prompts, score
from rldecoder.evals.task_text import solution

HELD_OUT = {
    "alive": 48, "kind": 56, "larger": 80, "mood": 56, "opposite": 29, "tense": 50,
}  # fmt: skip
"""Test prompts of each."""


def everything(task, split) -> list[TaskPrompt]:
    """A whole round; training asks again after it."""
    asked: dict[str, TaskPrompt] = {}
    for prompt in make_prompts(task, "train", 400, 0) if split == "train" else ():
        asked.setdefault(prompt.prompt, prompt)
    if split == "train":
        return [*asked.values()]
    count = 1
    while True:
        try:
            prompts = make_prompts(task, split, count, 0)
        except BadInputError:
            return prompts
        count += 1


def test_configs_and_prompts_know_the_same_tasks() -> None:
    assert set(get_args(TaskName)) == {*TASKS, *CHOICES}


@pytest.mark.parametrize("task", CHOICES)
def test_no_thing_is_asked_in_two_splits(task) -> None:
    groups = [{prompt.group for prompt in everything(task, split)} for split in SPLITS]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups))
    texts = [{prompt.prompt for prompt in everything(task, split)} for split in SPLITS]
    assert sum(map(len, texts)) == len(set.union(*texts))


@pytest.mark.parametrize("task", CHOICES)
def test_every_split_has_all_answers_in_equal_shares(task) -> None:
    for split in SPLITS:
        counts = Counter(prompt.answer for prompt in everything(task, split))
        assert max(counts.values()) - min(counts.values()) <= 4, counts
        assert len(counts) == (4 if task == "kind" else 2)
    assert len(everything(task, "test")) == HELD_OUT[task]


@pytest.mark.parametrize("task", CHOICES)
def test_worked_examples_are_asked_nowhere(task) -> None:
    prompts = [prompt for split in SPLITS for prompt in everything(task, split)]
    prefixes = {prompt.prompt.rsplit("\n\n", 1)[0] for prompt in prompts}
    (prefix,) = prefixes
    shown = {line for line in prefix.split("\n\n") if line}
    for prompt in prompts:
        question = prompt.prompt.rsplit("\n\n", 1)[1]
        assert not prompt.prompt.endswith(" ")
        assert not any(line.startswith(f"{question} ") for line in shown)


@pytest.mark.parametrize("task", CHOICES)
def test_the_right_answer_scores_and_another_does_not(task) -> None:
    prompts = everything(task, "train")
    answers = {prompt.answer for prompt in prompts}
    for prompt in prompts[:20]:
        assert prompt.max_new_tokens == MAX_NEW_TOKENS
        assert score(prompt, solution(prompt) + "\n") == 1
        assert score(prompt, f" {prompt.answer.capitalize()}. And so on") == 1
        for other in answers - {prompt.answer}:
            assert score(prompt, f" {other}, not {prompt.answer}") == 0
        assert score(prompt, "") == score(prompt, "\n") == 0


def test_larger_is_right_about_its_numbers() -> None:
    for split in SPLITS:
        for prompt in everything("larger", split):
            first, second = prompt.prompt.rsplit("Is ", 1)[1].removesuffix(" true?").split(" > ")
            assert prompt.answer == ("yes" if int(first) > int(second) else "no")


def test_the_seed_decides_the_order_and_no_split() -> None:
    one, other = (make_prompts("tense", "test", 50, seed) for seed in (0, 1))
    assert [p.prompt for p in one] != [p.prompt for p in other]
    assert {p.prompt for p in one} == {p.prompt for p in other}
    assert one == make_prompts("tense", "test", 50, 0)
