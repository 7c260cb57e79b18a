"""Solved prompts as text: right, of the training split alone, for the training text alone."""

from __future__ import annotations

import re

from rldecoder.evals.answers import stated_place
from rldecoder.evals.prompts import TASKS, make_prompts, score
from rldecoder.evals.task_text import QUESTIONS_PER_DOCUMENT, task_candidates


def documents(count: int = 12, seed: int = 0) -> dict[str, str]:
    found = {}
    for candidate in task_candidates(TASKS, count, seed):
        document = candidate.load()
        assert document is not None
        assert candidate.split == "train"
        found[candidate.key] = document.text
    return found


def test_every_sum_is_right_and_told_in_the_order_asked() -> None:
    seen = 0
    for key, text in documents().items():
        if not key.startswith("tasks:addition"):
            continue
        for question, a, b, total, answer in re.findall(
            r"Q: (.*?)\nA: (\d+) \+ (\d+) = (\d+)\. The answer is (\d+)\.", text
        ):
            assert f"{a} + {b}" in question
            assert int(a) + int(b) == int(total) == int(answer)
            seen += 1
    # The worked examples of each document, and its own questions.
    assert seen == 12 * (6 + QUESTIONS_PER_DOCUMENT)


def test_solutions_score_by_the_tasks_own_metric() -> None:
    texts = documents()
    prompts = {task: make_prompts(task, "train", 12 * 6, 0) for task in TASKS}
    for task, made in prompts.items():
        for number, prompt in enumerate(made):
            question = prompt.prompt.split("\n\n")[-1]
            text = texts[f"tasks:{task}:{number // QUESTIONS_PER_DOCUMENT}"]
            completion = text.split(question, 1)[1].split("\n\n")[0]
            assert score(prompt, completion) == 1, (question, completion)
    assert stated_place(" attic.", "box") == 0


def test_no_question_of_another_split_is_told() -> None:
    told = "\n".join(documents(40).values())
    for task in TASKS:
        for split in ("validation", "test"):
            for prompt in make_prompts(task, split, 16, 0):
                assert prompt.prompt.split("\n\n")[-1] not in told
                if task == "addition":
                    a, b = prompt.group.split("+")
                    assert f" {a} + {b} =" not in told
                    assert f" {b} + {a} =" not in told


def test_the_seed_decides() -> None:
    assert documents(3) == documents(3) != documents(3, seed=1)
