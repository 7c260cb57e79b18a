"""Generated prompts: answers are right, splits are disjoint, the same seed gives the same."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rldecoder.errors import BadInputError
from rldecoder.evals.prompts import SPLITS, TASKS, TaskPrompt, make_prompts, score

FACT = re.compile(r"The (\w+) is in the (\w+)\.")


def everything(task: str, split: str) -> list[TaskPrompt]:
    count = {
        "addition": {"validation": 128, "test": 376},
        "cloze": {"validation": 256, "test": 256},
    }
    return make_prompts(task, split, count[task].get(split, 800), seed=0, repeat_facts=True)


def asked_sum(prompt: TaskPrompt) -> tuple[int, int]:
    question = prompt.prompt.split("\n")[-2]
    a, b = re.findall(r"\d+", question)
    return int(a), int(b)


def test_addition_answers_are_right_and_shots_are_not_asked():
    for split in SPLITS:
        for prompt in everything("addition", split):
            a, b = asked_sum(prompt)
            assert prompt.answer == str(a + b)
            shots = prompt.prompt.split("\n\n")[:-1]
            assert len(shots) == 6
            for shot in shots:
                left, right, total, again = map(int, re.findall(r"\d+", shot)[2:])
                assert left + right == total == again
                assert {left, right} != {a, b}


def test_cloze_answers_are_stated_once_and_unambiguous():
    for split in SPLITS:
        for prompt in everything("cloze", split):
            facts = FACT.findall(prompt.prompt)
            assert len(facts) == 3
            assert len({thing for thing, _ in facts}) == len({place for _, place in facts}) == 3
            thing = re.search(r"Where is the (\w+)\?", prompt.prompt)[1]
            assert dict(facts)[thing] == prompt.answer
            assert prompt.prompt.endswith(f"The {thing} is in the")


def test_splits_share_no_question():
    for one, other in combinations(SPLITS, 2):
        sums = [{frozenset(asked_sum(p)) for p in everything("addition", s)} for s in (one, other)]
        assert not sums[0] & sums[1]
        facts = [
            {fact for p in everything("cloze", split) for fact in FACT.findall(p.prompt)}
            for split in (one, other)
        ]
        assert not facts[0] & facts[1]


def test_training_sees_every_answer_that_is_asked_for_elsewhere():
    """A policy that never saw an answer rewarded would be tested on the answer, not on the pair."""
    pairs = {
        split: {tuple(sorted(asked_sum(p))) for p in everything("addition", split)}
        for split in SPLITS
    }
    trained = {sum(pair) for pair in pairs["train"]}
    assert trained == set(range(30))  # those of a single pair, such as 0 and 29, included
    shots = {(3, 4), (6, 12), (5, 9), (7, 11), (8, 18), (0, 6)}
    every = {(a, b) for a in range(10) for b in range(a, 21)}
    assert pairs["train"] | pairs["validation"] | pairs["test"] == every - shots
    assert sum(len(of_split) for of_split in pairs.values()) == len(every - shots)
    assert {split: len(found) for split, found in pairs.items()} == {
        "train": 95, "validation": 16, "test": 48,
    }  # fmt: skip
    assert len({sum(pair) for pair in pairs["test"]}) > 15  # not all of a few sums


@pytest.mark.parametrize(("split", "count"), [("train", 95), ("validation", 16), ("test", 48)])
def test_every_pair_is_asked_before_one_is_asked_again(split, count):
    prompts = make_prompts("addition", split, 2 * count, seed=1)
    for part in (prompts[:count], prompts[count:]):
        assert len({prompt.group for prompt in part}) == count
    orders = [a < b for a, b in map(asked_sum, prompts[:count])]
    assert any(orders)
    assert not all(orders)
    assert len({prompt.prompt.split("\n")[-2][:10] for prompt in prompts}) == 4  # wordings


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_fact_is_asked_before_one_is_asked_again(split):
    prompts = everything("cloze", split)
    for start in range(0, len(prompts), 64):
        assert len({prompt.group for prompt in prompts[start : start + 64]}) == 64
    assert make_prompts("cloze", split, 64, seed=0) == prompts[:64]


def test_prompts_about_one_thing_share_a_group():
    for prompt in everything("addition", "test"):
        a, b = asked_sum(prompt)
        assert prompt.group == f"{min(a, b)}+{max(a, b)}"
    for prompt in everything("cloze", "test"):
        thing = re.search(r"Where is the (\w+)\?", prompt.prompt)[1]
        assert prompt.group == f"{thing}-{prompt.answer}"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_prompts_never_repeat(task, split):
    prompts = everything(task, split)
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    with pytest.raises(BadInputError, match=f"Ask for at most {len(prompts)}"):
        make_prompts(task, split, len(prompts) + 1, seed=0, repeat_facts=True)
    if task == "cloze":
        with pytest.raises(BadInputError, match="Ask for at most 64"):
            make_prompts(task, split, 65, seed=0)


@settings(max_examples=25, deadline=None)
@given(task=st.sampled_from(TASKS), count=st.integers(0, 30), seed=st.integers(0, 10**6))
def test_deterministic_and_indexed(task, count, seed):
    prompts = make_prompts(task, "train", count, seed)
    assert prompts == make_prompts(task, "train", count, seed)
    assert [prompt.index for prompt in prompts] == list(range(count))
    assert make_prompts(task, "train", 40, seed)[:count] == prompts


def test_unknown_task():
    with pytest.raises(BadInputError, match="no task"):
        make_prompts("division", "train", 1, 0)


@pytest.mark.parametrize(
    ("task", "answer", "completion", "expected"),
    [
        ("addition", "13", " 4 + 9 = 13. The answer is 13.\n", 1),
        ("addition", "13", " 4 + 9 = 13. The answer is 12.\n", 0),
        ("addition", "13", " The answer is 130", 0),
        ("addition", "13", " 4 + 9 = 13.\nThe answer is 13.", 0),
        ("addition", "13", "\nThe answer is 13", 1),
        ("addition", "13", "", 0),
        ("cloze", "box", " box.", 1),
        ("cloze", "box", " Box", 1),
        ("cloze", "box", " boxes", 0),
        ("cloze", "box", " bag, not the box", 0),
        ("cloze", "box", " ...", 0),
    ],
)
def test_score(task, answer, completion, expected):
    metric = make_prompts(task, "train", 1, 0)[0].metric
    assert score(TaskPrompt(task, "test", 0, "", answer, metric, 9), completion) == expected
