"""Training prompts of the generated tasks with their answers, as text to be ingested.

An SAE that never saw a sum spends no latents on sums, and the decoder that reads it answers them
badly. Only prompts of the training split are told, and only to the training text: what validation
and test ask for is in no document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial

from rldecoder.data.documents import Candidate, Document
from rldecoder.evals.prompts import Task, TaskPrompt, make_prompts

QUESTIONS_PER_DOCUMENT = 6
LICENCE = "Apache-2.0"


def task_candidates(tasks: Iterable[Task], num_documents: int, seed: int) -> Iterator[Candidate]:
    """Documents of some solved prompts each, the tasks in turn, all for the split `train`.

    Args:
        num_documents: documents per task.
        seed: decides which questions stand in which document.
    """
    count = num_documents * QUESTIONS_PER_DOCUMENT
    prompts = {task: make_prompts(task, "train", count, seed) for task in dict.fromkeys(tasks)}
    for number in range(num_documents):
        first = number * QUESTIONS_PER_DOCUMENT
        for task, made in prompts.items():
            solved = made[first : first + QUESTIONS_PER_DOCUMENT]
            load = partial(_document, task, number, solved)
            yield Candidate(_key(task, number), load, split="train")


def _document(task: Task, number: int, prompts: list[TaskPrompt]) -> Document:
    """Solved prompts one below the other; worked examples that open each are told once."""
    texts = [prompts[0].prompt + solution(prompts[0])]
    for prompt in prompts[1:]:
        question = prompt.prompt.split("\n\n")[-1]
        texts.append(question + solution(prompt))
    text = "\n\n".join(texts) + "\n"
    return Document(_key(task, number), f"{task} {number}", "rldecoder tasks", LICENCE, text)


def _key(task: Task, number: int) -> str:
    return f"tasks:{task}:{number}"


def solution(prompt: TaskPrompt) -> str:
    """What stands after the prompt when it is answered as its worked examples are."""
    if prompt.metric == "sum":
        # In the order in which they are asked; `group` has the smaller one first.
        first, second = re.findall(r"(\d+) \+ (\d+)", prompt.prompt)[-1]
        return f" {first} + {second} = {prompt.answer}. The answer is {prompt.answer}."
    return f" {prompt.answer}." if prompt.metric == "place" else f" {prompt.answer}"
