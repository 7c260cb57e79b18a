"""Questions, passages and stated answers of a task's file, in the forms that public sets have.

- GSM8K: `answer` is the solution, and ends in `#### 42`; with `final_answer` besides, it is that.
- SQuAD: `answers` is {"text": [...], "answer_start": [...]}, the passage is called `context`.
- TriviaQA: `answer` is {"value": ..., "aliases": [...]}.
- BoolQ: `answer` is true or false, and said as yes or no.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rldecoder.data.files import as_text, is_undecodable, kind_of, listed, printable, read_rows
from rldecoder.errors import BadInputError

_ANSWERS = ("final_answer", "answers", "answer")
_PASSAGES = ("passage", "context")
_CHOICES = ("choices", "options")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's calculator annotations; nobody writes them in an answer."""
_AFTER_SOLUTION = re.compile(r"(?:^|\s)####\s*(\S[^\n]*)\s*\Z")
_TRUTHS = {"true": "yes", "false": "no"}


class TaskRow(NamedTuple):
    """A question with its answers."""

    question: str
    passage: str
    """"" where there is none."""
    answers: tuple[str, ...]
    """All that count as right."""
    worked: str
    """The answer as an example shows it."""
    split: str | None
    """As the file names it."""


def read_task(path: Path, left_out: Counter[str]) -> list[TaskRow]:
    """The rows of a Parquet, JSONL, JSON or CSV file that ask something and say its answer.

    Args:
        left_out: counts the others, by reason.

    Raises:
        BadInputError: the file cannot be read, misses a column, has a value of another form than
            those above, or no question with an answer.
    """
    if not path.is_file() or kind_of(path) in (None, "text"):
        raise BadInputError(
            f"{printable(path)} is not a task that can be read.",
            "It does not exist." if not path.exists() else "It is no file with rows.",
            "Name a .parquet, .jsonl, .json, .csv or .tsv file.",
        )

    rows = []
    for number, row in enumerate(read_rows(path)):
        where = f"{printable(path)}, row {number}"
        answer, passage = _columns(row, where)
        golds = tuple(_golds(row[answer], where))
        question = _text(row["question"], where, "question")
        if not question or not golds:
            left_out["without a question" if not question else "without an answer"] += 1
            continue

        # Data sets with `final_answer` show the way to it in `answer`.
        shown = row.get("answer") if answer == "final_answer" else None
        worked = as_text(shown) or as_text(row[answer]) or golds[0]
        story = _text(row[passage], where, passage) if passage else ""
        if any(map(is_undecodable, (question, story, worked, *golds))):
            left_out["not UTF-8"] += 1
            continue

        split = None if row.get("split") is None else _text(row["split"], where, "split")
        rows.append(TaskRow(question, story, golds, _CALCULATOR.sub("", worked), split))

    if not rows:
        counts = ", ".join(f"{count} {why}" for why, count in left_out.items())
        raise BadInputError(
            f"{printable(path)} has no question with an answer.",
            f"Rows left out: {counts or 'none, it is empty'}.",
            "Name a file with the columns `question` and `answer`.",
        )
    return rows


def _columns(row: Any, where: str) -> tuple[str, str | None]:
    """The columns with the answer and the passage."""
    names = list(row) if isinstance(row, Mapping) else []
    answer = next((name for name in _ANSWERS if name in names), None)
    if "question" not in names or answer is None:
        raise BadInputError(
            f"{where}: this is not a task, it has the columns {listed(names)}.",
            "A task needs `question` and one of `answer`, `answers`, `final_answer`; its passage "
            "is `passage` or `context`.",
            "Rename its columns.",
        )
    choices = next((name for name in _CHOICES if name in names), None)
    if choices is not None:
        raise BadInputError(
            f"{where}: the column `{choices}` makes this a multiple choice.",
            "Prompts show no choices, so that their number or letter could not be answered.",
            f"Write the choices into `question`, the right one into `answer`; remove `{choices}`.",
        )
    return answer, next((name for name in _PASSAGES if name in names), None)


def _text(value: Any, where: str, column: str) -> str:
    """A value that is to be text; "" where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = as_text(value)
    if text is None:
        raise BadInputError(
            f"{where}: `{column}` holds {type(value).__name__}, no text.",
            f"It is {str(value)[:80]!r}.",
            "Write it as one string.",
        )
    return text if text.strip() else ""


def _golds(value: Any, where: str) -> Iterator[str]:
    """All answers that a value states, whatever its form; none for an empty one."""
    if isinstance(value, Mapping):
        lists = [value.get(name) for name in ("text", "value", "aliases")]
        if not any(name in value for name in ("text", "value")):
            raise BadInputError(
                f"{where}: an answer of this form is not known: {str(dict(value))[:120]}.",
                "Known are text, numbers, true and false, lists of them, SQuAD's `text` and "
                "TriviaQA's `value`.",
                "Write the answers as strings.",
            )
        value = [item for item in lists if item is not None]

    if isinstance(value, list | tuple):
        for item in value:
            yield from _golds(item, where)
    elif isinstance(value, bool):
        yield "yes" if value else "no"
    elif isinstance(value, float) and value.is_integer():
        yield str(int(value))  # a column of whole numbers with a gap is read as floats
    elif value is not None and not (isinstance(value, float) and math.isnan(value)):
        text = as_text(value)
        text = str(value) if text is None else text
        found = _AFTER_SOLUTION.search(text)
        text = (found.group(1) if found else text).strip()
        if text:
            yield text
        if text.casefold() in _TRUTHS:
            yield _TRUTHS[text.casefold()]
