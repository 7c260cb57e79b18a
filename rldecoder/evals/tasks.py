"""Run a verifiable task with a model and score it, with confidence intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rldecoder.evals.generation import GenerateFunction, newline_token_ids
from rldecoder.evals.prompts import TaskPrompt, score
from rldecoder.evals.statistics import bootstrap_mean_ci, wilson_interval
from rldecoder.json_text import parse_json
from rldecoder.lm.text_tokens import answer_texts, encode_prompts


class TaskRow(NamedTuple):
    """One prompt's outcome."""

    task: str
    prompt_index: int
    """`TaskPrompt.index`."""
    answer: str
    completion: str
    """The generated text without special tokens."""
    score: float
    """0 to 1."""
    group: str = ""
    """`TaskPrompt.group`."""


def rows_to_json(rows: Iterable[TaskRow]) -> str:
    """Outcomes as text, for another process."""
    return json.dumps([row._asdict() for row in rows])


def rows_from_json(text: str) -> list[TaskRow]:
    """What `rows_to_json` was given."""
    return [TaskRow(**row) for row in parse_json(text)]


class TaskResult(NamedTuple):
    """A score with its 95 % interval."""

    score: float
    """Mean over the prompts, 0 to 1."""
    n: int
    ci_low: float
    ci_high: float
    rows: list[TaskRow]
    """One row a prompt, in the order of the prompts."""

    @property
    def scores(self) -> list[float]:
        """The single scores, for paired comparisons on the same prompts."""
        return [row.score for row in self.rows]

    @property
    def groups(self) -> list[str]:
        """What intervals resample: each row's group, tasks apart; a row without one is alone."""
        return [f"{row.task}/{row.group or f'#{row.prompt_index}'}" for row in self.rows]

    def of_task(self, task: str) -> TaskResult:
        """The part of the result that belongs to one task."""
        return summarise(row for row in self.rows if row.task == task)


def run_task(
    generate: GenerateFunction,
    prompts: Sequence[TaskPrompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    stop_ids: Sequence[int] | None = None,
    end_ids: Sequence[int] = (),
) -> TaskResult:
    """Answer every prompt greedily and score the answers.

    Args:
        generate: `model.generate` of a `transformers` model, or the faster
            `rldecoder.evals.generation.prefix_generate(model)`.
        prompts: of any mixture of tasks; batches hold one task each.
        tokenizer: of the frozen model; its padding side does not matter.
        stop_ids: tokens that end an answer and belong to it. By default every token with a line
            break, found anew on each call (about 0.1 s for 50k tokens).
        end_ids: tokens that end an answer and do not belong to it (`FrozenLM.end_token_ids`),
            beside the tokenizer's end of text.
    """
    eos = tokenizer.eos_token_id
    ends = [*dict.fromkeys([*end_ids, *([] if eos is None else [eos])])]
    stops = [*(newline_token_ids(tokenizer) if stop_ids is None else stop_ids)]
    stops += [end for end in ends if end not in stops]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    rows: dict[int, TaskRow] = {}
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        chosen = [i for i, prompt in enumerate(prompts) if prompt.task == task]
        for start in range(0, len(chosen), batch_size):
            places = chosen[start : start + batch_size]
            batch = [prompts[i] for i in places]
            texts = _answer(generate, batch, tokenizer, stops, ends, pad, device)
            for place, prompt, text in zip(places, batch, texts, strict=True):
                rows[place] = task_row(prompt, text)
    return summarise(rows[i] for i in range(len(prompts)))


def task_row(prompt: TaskPrompt, completion: str) -> TaskRow:
    """The outcome of one completion."""
    points = score(prompt, completion)
    return TaskRow(prompt.task, prompt.index, prompt.answer, completion, points, prompt.group)


def summarise(rows: Iterable[TaskRow]) -> TaskResult:
    """Mean score of some rows, with Wilson's interval or, where answers were partly right (F1),
    a bootstrap over the prompts; no rows give score 0 and interval (0, 1)."""
    kept = list(rows)
    scores = [row.score for row in kept]
    if set(scores) <= {0.0, 1.0}:
        low, high = wilson_interval(sum(scores), len(kept))
    else:
        _, low, high = bootstrap_mean_ci(scores, seed=0)
    return TaskResult(sum(scores) / max(1, len(kept)), len(kept), low, high, kept)


def _answer(
    generate: GenerateFunction,
    batch: Sequence[TaskPrompt],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    end_ids: list[int],
    pad: int,
    device: torch.device | str,
) -> list[str]:
    ids = encode_prompts(tokenizer, [prompt.prompt for prompt in batch])
    width = max(len(row) for row in ids)
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    with torch.no_grad():
        out = generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=batch[0].max_new_tokens,
            do_sample=False,
            eos_token_id=stop_ids,
            pad_token_id=pad,
        )
    return answer_texts(tokenizer, out[:, width:].tolist(), end_ids)
