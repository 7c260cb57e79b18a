"""Prompts from Parquet files: SQuAD, GSM8K, BoolQ, or one's own questions.

The splits are disjoint by construction, whatever the file says: questions about one passage (or,
without passages, one question in any spelling of case and spaces) are a group, and a group has one
split. A group with a test question is a test group; its training questions are dropped. Every
tenth of the other groups, by hash, is for validation. A file without the column `split` gives a
tenth of its groups to the test as well.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rldecoder import schemas
from rldecoder.config.tasks import FileTask
from rldecoder.errors import BadInputError
from rldecoder.evals.prompts import Split, TaskPrompt
from rldecoder.lm.text_tokens import encode_prompt
from rldecoder.seeds import derive_seed

_TEST_NAMES = ("test", "dev", "validation")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's calculator annotations; nobody writes them in an answer."""


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
        BadInputError: the file misses a column, or holds fewer examples than `shots`.
        DamagedFileError: the file is missing or is not Parquet.
    """

    def __init__(
        self,
        task: FileTask,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int | None = None,
    ) -> None:
        self.task, self._tokenizer = task, tokenizer
        self._room = task.max_prompt_tokens
        if context_length is not None:
            self._room = min(self._room, context_length - task.max_new_tokens)
        self._questions = _by_split(_read(task))
        self._examples = self._take_examples()

    def make(self, split: Split, count: int, seed: int, *, fewer: bool = False) -> list[TaskPrompt]:
        """`count` prompts, the same for the same seed. Only training prompts ever repeat.

        Args:
            split: "train", "validation" or "test".
            count: how many.
            seed: of their order.
            fewer: of a held-out split, be content with fewer, but not with none.

        Raises:
            BadInputError: there are not enough.
        """
        task = self.task
        rng = random.Random(derive_seed(seed, "prompts", task.name, split))
        prompts: list[TaskPrompt] = []
        too_long = 0
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


def _read(task: FileTask) -> list[tuple[str | None, Question]]:
    """Rows with the split that the file names, None where it names none."""
    table = schemas.read_parquet(task.path)
    names = table.column_names
    answer = next((name for name in ("final_answer", "answers", "answer") if name in names), None)
    if "question" not in names or answer is None:
        raise BadInputError(
            f"{task.path} is not a task: it has the columns {', '.join(names)}.",
            "A task needs `question` and one of `answer`, `answers`, `final_answer`.",
            "Rename its columns.",
        )
    rows = []
    for row in table.to_pylist():
        answers = _answers(row[answer])
        if not answers or not row["question"]:
            continue
        passage = row.get("passage") or ""
        shown = row.get("answer") if answer == "final_answer" else None
        worked = _CALCULATOR.sub("", shown) if isinstance(shown, str) else answers[0]
        text = f"{passage}\n\n" * bool(passage) + f"Question: {row['question']}\nAnswer:"
        group = _hash("group", passage or row["question"])
        rows.append((row.get("split"), Question(text, answers, " ".join(worked.split()), group)))
    return rows


def _by_split(rows: list[tuple[str | None, Question]]) -> dict[Split, list[Question]]:
    tested = {q.group for split, q in rows if split in _TEST_NAMES}
    found: dict[Split, list[Question]] = {"train": [], "validation": [], "test": []}
    for split, question in rows:
        place = int(question.group, 16) % 10
        if split in _TEST_NAMES or (split is None and place == 1):
            found["test"].append(question)
        elif split is not None and question.group in tested:
            continue
        else:
            found["validation" if place == 0 else "train"].append(question)
    return found


def _answers(value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("yes",) if value else ("no",)
    if isinstance(value, list):
        return tuple(str(item) for item in value if str(item).strip())
    return (str(value),) if value is not None and str(value).strip() else ()


def _hash(*parts: str) -> str:
    text = "\0".join(" ".join(part.casefold().split()) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()
