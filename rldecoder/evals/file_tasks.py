"""Prompts from files: SQuAD, GSM8K, BoolQ as the hub has them, or one's own questions.

The splits are disjoint by construction, whatever the file says: questions about one passage (or,
without passages, one question in any spelling of case and spaces) are a group, and a group has one
split. A group with a test question is a test group; its training questions are dropped. Every
tenth of the other groups, by hash, is for validation. A file without the column `split` gives a
tenth of its groups to the test as well.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rldecoder.config.tasks import FileTask
from rldecoder.errors import BadInputError
from rldecoder.evals.answers import score_answer
from rldecoder.evals.prompts import Split, TaskPrompt
from rldecoder.evals.task_rows import TaskRow, read_task
from rldecoder.lm.text_tokens import encode_prompt
from rldecoder.seeds import derive_seed

_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "dev", "validation", "valid", "val", "eval")


class Question(NamedTuple):
    """A row of the file."""

    text: str
    """The question as asked, with its passage."""
    answers: tuple[str, ...]
    """All that count as right."""
    worked: str
    """The answer as an example shows it, on one line."""
    group: str
    """Questions of one group are never in two splits."""


class FilePrompts:
    """The prompts of one file, by split.

    Args:
        task: which file, and how its answers are judged.
        tokenizer: of the frozen model.
        context_length: of the frozen model; prompts that leave no room for an answer are left out.

    Raises:
        BadInputError: the file cannot be read, misses a column, has an answer that its metric
            does not count as right, or holds fewer examples than `shots`.
    """

    def __init__(
        self, task: FileTask, tokenizer: PreTrainedTokenizerBase, context_length: int | None = None
    ) -> None:
        self.task, self._tokenizer = task, tokenizer
        self._room = task.max_prompt_tokens
        if context_length is not None:
            self._room = min(self._room, context_length - task.max_new_tokens)
        self.left_out: Counter[str] = Counter()
        """Rows that ask nothing or have no answer, by reason."""
        rows = read_task(task.path, self.left_out)
        _check_answers(task, rows)
        self._questions = _by_split(task, rows)
        self._examples = self._take_examples()

    def make(self, split: Split, count: int, seed: int, *, fewer: bool = False) -> list[TaskPrompt]:
        """`count` prompts, the same for the same seed. Only training prompts ever repeat.

        Args:
            split: "train", "validation" or "test".
            seed: of their order.
            fewer: of a held-out split, be content with fewer, but not with none.

        Raises:
            BadInputError: there are not enough.
        """
        task = self.task
        rng = random.Random(derive_seed(seed, "prompts", task.name, split))
        prompts: list[TaskPrompt] = []
        too_long = 0

        # A round gives every question once; only training needs a second one.
        while len(prompts) < count:
            before = len(prompts)
            order = rng.sample(self._questions[split], len(self._questions[split]))
            for question in order:
                if len(prompts) == count:
                    break
                text = self._examples + question.text
                if len(encode_prompt(self._tokenizer, text)) > self._room:
                    too_long += 1
                    continue
                prompts.append(
                    TaskPrompt(
                        task.name, split, len(prompts), text, question.answers[0], task.metric,
                        task.max_new_tokens, question.answers, question.group,
                    )
                )  # fmt: skip

            if fewer and split != "train" and prompts:
                break
            if len(prompts) < count and (split != "train" or len(prompts) == before):
                raise BadInputError(
                    f"{task.path} has {len(prompts)} {split} prompts; {count} were asked for.",
                    f"{too_long} others are longer than {self._room} tokens with their "
                    f"{task.shots} worked examples.",
                    f"Ask for fewer, or raise max_prompt_tokens of task {task.name} (the answer "
                    "must fit into the model's context besides).",
                )
        return prompts

    def _take_examples(self) -> str:
        """The text of the worked examples, whose groups leave the training questions.

        Drawn by hash from the shorter half: a long example costs room in every prompt.
        """
        task, training = self.task, self._questions["train"]
        shorter = sorted(training, key=lambda q: len(q.text) + len(q.worked))
        shorter = shorter[: max(task.shots, len(shorter) // 2)]
        chosen = sorted(shorter, key=lambda q: _hash("example", q.text))[: task.shots]
        if len(chosen) < task.shots:
            raise BadInputError(
                f"Task {task.name} wants {task.shots} worked examples.",
                f"{task.path} has {len(training)} training questions.",
                "Lower `shots`.",
            )
        used = {question.group for question in chosen}
        self._questions["train"] = [q for q in training if q.group not in used]
        return "".join(f"{question.text} {question.worked}\n\n" for question in chosen)


def _check_answers(task: FileTask, rows: list[TaskRow]) -> None:
    """Refuse a task of which some question cannot be answered: not even its own answer counts."""
    wrong = [
        row
        for row in rows
        if max(score_answer(task.metric, answer, row.answers) for answer in row.answers) < 1
    ]
    if wrong:
        shown = f"{wrong[0].answers[0][:80]!r} to {wrong[0].question[:80]!r}"
        raise BadInputError(
            f"{len(wrong):,} of {len(rows):,} answers of task {task.name} cannot be right: by the "
            f"metric `{task.metric}` not even the stated answer scores 1.",
            f"The first is {shown} in {task.path}.",
            "Choose another `metric`, or mend or remove these rows. (`number` wants one number in "
            "each stated answer; other answers end at the first line break.)",
        )


def _by_split(task: FileTask, rows: list[TaskRow]) -> dict[Split, list[Question]]:
    pairs = [(_split_named(task, row), _question(row)) for row in rows]
    tested = {q.group for split, q in pairs if split == "test"}
    found: dict[Split, list[Question]] = {"train": [], "validation": [], "test": []}
    for split, question in pairs:
        place = int(question.group, 16) % 10
        if split == "test" or (split is None and place == 1):
            found["test"].append(question)
        elif split is not None and question.group in tested:
            continue
        else:
            found["validation" if place == 0 else "train"].append(question)
    return found


def _split_named(task: FileTask, row: TaskRow) -> Split | None:
    """The split that the file names; what trains must never be guessed."""
    name = row.split.strip().casefold() if row.split is not None else ""
    if name in _TEST_NAMES:
        return "test"
    if name and name not in _TRAIN_NAMES:
        raise BadInputError(
            f"{task.path} names a split {row.split!r}.",
            f"Known are {', '.join((*_TRAIN_NAMES, *_TEST_NAMES))}.",
            "Rename it, or leave the column `split` out: a tenth is then for the test.",
        )
    return "train" if name else None


def _question(row: TaskRow) -> Question:
    text = f"{row.passage}\n\n" * bool(row.passage) + f"Question: {row.question}\nAnswer:"
    group = _hash("group", row.passage or row.question)
    return Question(text, row.answers, " ".join(row.worked.split()), group)


def _hash(*parts: str) -> str:
    text = "\0".join(" ".join(part.casefold().split()) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()
