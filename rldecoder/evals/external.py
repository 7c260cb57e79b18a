"""Tasks read from Parquet files (GSM8K, BoolQ, SQuAD, or one's own), answered in free text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rldecoder import schemas
from rldecoder.errors import BadInputError
from rldecoder.evals.generation import GenerateFunction

Metric = Literal["exact_match", "first_word", "f1", "number"]


class Question(NamedTuple):
    """One question with the answers that count."""

    prompt: str
    answers: tuple[str, ...]


def read_questions(path: Path, count: int) -> list[Question]:
    """The first `count` rows of the test split (of all rows, when there is no `split` column).

    Columns: `question`; `answer` or `answers` or `final_answer`; optionally `passage`, `split`.

    Raises:
        BadInputError: a needed column is missing.
        DamagedFileError: the file is missing or is not Parquet.
    """
    table = schemas.read_parquet(path)
    answer = next(
        (name for name in ("final_answer", "answers", "answer") if name in table.column_names), None
    )
    if "question" not in table.column_names or answer is None:
        raise BadInputError(
            f"{path} is not a task: it has the columns {', '.join(table.column_names)}.",
            "A task needs `question` and one of `answer`, `answers`, `final_answer`.",
            "Rename its columns.",
        )
    questions = []
    for row in table.to_pylist():
        if row.get("split", "test") not in ("test", "dev", "validation"):
            continue
        passage = f"{row['passage']}\n\n" if row.get("passage") else ""
        prompt = f"{passage}Question: {row['question']}\nAnswer:"
        questions.append(Question(prompt, _answers(row[answer])))
        if len(questions) == count:
            break
    return questions


def score_answer(metric: Metric, completion: str, answers: Sequence[str]) -> float:
    """The best score over the answers, 0 to 1.

    `exact_match` and `f1` compare the first line after SQuAD's normalisation (lower case,
    no punctuation and articles); `first_word` only its first word (yes/no questions); `number`
    the last number of the whole completion.
    """
    if metric == "number":
        numbers = re.findall(r"-?\d+(?:\.\d+)?", completion.replace(",", ""))
        found = float(numbers[-1]) if numbers else None
        return float(any(found == _number(answer) for answer in answers if found is not None))
    line = completion.strip().split("\n", 1)[0]
    compare = {"exact_match": _exact, "first_word": _first_word, "f1": _token_f1}[metric]
    return max((compare(line, answer) for answer in answers), default=0.0)


@torch.no_grad()
def answer_questions(
    generate: GenerateFunction,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    context_length: int,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Greedy completions. Prompts that leave no room for the answer lose their beginning."""
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    room = context_length - max_new_tokens
    completions = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        rows = [tokenizer.encode(question.prompt)[-room:] for question in batch]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device
        )
        out = generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=[eos],
            pad_token_id=pad,
        )
        completions += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return completions


def _answers(value: object) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("yes",) if value else ("no",)
    if isinstance(value, list):
        return tuple(str(item) for item in value)
    return (str(value),)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").strip())
    except ValueError:
        return None


def _normalise(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _exact(found: str, expected: str) -> float:
    return float(_normalise(found) == _normalise(expected))


def _first_word(found: str, expected: str) -> float:
    return float(_normalise(found)[:1] == _normalise(expected)[:1] != [])


def _token_f1(found: str, expected: str) -> float:
    first, second = _normalise(found), _normalise(expected)
    if not first or not second:
        return float(first == second)
    common = sum((Counter(first) & Counter(second)).values())
    if not common:
        return 0.0
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall)
