"""Held-out prompts to explain: task prompts and the beginnings of text of the test split."""

from __future__ import annotations

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.evals.prompts import TASKS, make_prompts
from rldecoder.lm.frozen import FrozenLM

PROSE = (
    "She put the letter back into the envelope and",
    "The doctor told him that he should drink more",
    "It had been raining all day, so the children stayed",
    "The train to Paris leaves at",
    "He opened the window because the room was too",
    "My grandmother used to bake bread every",
)
"""Ordinary sentences that break off: the examples of a run."""
TOKENS_PER_BATCH = 4096
MAX_TASK_TEXTS = 48
"""Fewer than the smallest task has: test prompts never repeat."""


def task_texts(count: int, seed: int) -> list[str]:
    """`count` test prompts of each generated task, task by task."""
    return [prompt.prompt for task in TASKS for prompt in make_prompts(task, "test", count, seed)]


def text_beginnings(lm: FrozenLM, reader: ActivationReader, count: int, length: int) -> list[str]:
    """The first `length` tokens of the first `count` sequences of a split."""
    found: dict[int, list[int]] = {}
    for batch in reader.ordered(TOKENS_PER_BATCH, columns=()):
        for sequence, token in zip(batch.seq_id.tolist(), batch.token_id.tolist(), strict=True):
            if len(found.setdefault(sequence, [])) < length:
                found[sequence].append(token)
        if len(found) > count:
            break
    rows = list(found.values())[:count]
    return [str(lm.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
