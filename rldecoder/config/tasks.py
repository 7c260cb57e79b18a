"""Settings of tasks that are read from files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rldecoder.config.base import Config

TASK_READER_VERSION = 2
"""Raised when the same file would give other questions or answers, or other scores. It is part of
the digest of runs with such tasks, and of no others."""

TaskName = Literal["addition", "cloze", "alive", "kind", "larger", "mood", "opposite", "tense"]
"""The generated tasks (`rldecoder.evals.prompts`)."""

Metric = Literal["exact_match", "first_word", "f1", "number"]


class FileTask(Config):
    """Questions from a file (SQuAD, GSM8K, BoolQ as the hub has them, or one's own), answered in
    free text. One whose stated answers do not score 1 by its metric is refused."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Its name in the tables."""
    path: Path
    """Parquet, JSONL, JSON, CSV or TSV with the columns `question`; `answer`, `answers` or
    `final_answer`; and optionally `passage` (or `context`) and `split`. An answer may be text, a
    number, true or false, a list of them, GSM8K's solution (what stands after ####), or SQuAD's
    `text`. Its content is part of the digest."""
    metric: Metric = "exact_match"
    """`exact_match`, `first_word` (yes/no) or token `f1` with the stated answers, or `number`: the
    last number of the answer is the one number that is stated. An answer ends at its first line
    break."""
    max_new_tokens: int = Field(32, ge=1)
    """Length of an answer."""
    max_prompt_tokens: int = Field(384, ge=1)
    """Longer prompts are left out; the answer must fit into the model's context besides."""
    shots: int = Field(0, ge=0, le=16)
    """Worked examples before every question. They are training questions that are used for nothing
    else; where the answer is the end of a solution, the solution is shown as the working."""
