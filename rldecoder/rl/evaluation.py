"""Held-out judgement of a decoder during PPO: task score and KL to the frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.distill import matmul_precision
from rldecoder.decoder.faithfulness import Faithfulness, evaluate_faithfulness
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.generation import newline_token_ids, prefix_generate
from rldecoder.evals.prompts import Split
from rldecoder.evals.suite import TaskSuite, check_lengths
from rldecoder.evals.tasks import TaskResult, run_task
from rldecoder.lm.frozen import FrozenLM
from rldecoder.rl.core import RewardWeights
from rldecoder.schemas import table_schema


class EvaluationRow(NamedTuple):
    """A task in an evaluation: see EVALUATIONS."""

    step: int
    stage: int
    task: str
    score: float
    score_low: float
    score_high: float
    num_prompts: int
    kl: float
    kl_low: float
    kl_high: float
    accuracy: float
    agreement: float
    faithfulness_weight: float
    monosemanticity_weight: float
    task_weight: float


EVALUATIONS = table_schema(EvaluationRow, stage=pa.int8())
"""One row a task (and `all`) and evaluation on the validation split. `step` counts PPO steps done;
stage 0 is before training. Intervals are 95 % (Wilson; bootstrap over sequences)."""


class Evaluation(NamedTuple):
    """One evaluation."""

    tasks: TaskResult
    text: Faithfulness

    def rows(self, step: int, stage: int, weights: RewardWeights) -> list[EvaluationRow]:
        """Rows of EVALUATIONS: over all tasks, then each."""
        text, rows = self.text, []
        for task in ["all", *dict.fromkeys(row.task for row in self.tasks.rows)]:
            part = self.tasks if task == "all" else self.tasks.of_task(task)
            rows.append(
                EvaluationRow(
                    step=step,
                    stage=stage,
                    task=task,
                    score=part.score,
                    score_low=part.ci_low,
                    score_high=part.ci_high,
                    num_prompts=part.n,
                    kl=text.kl,
                    kl_low=text.kl_low,
                    kl_high=text.kl_high,
                    accuracy=text.accuracy,
                    agreement=text.agreement,
                    faithfulness_weight=weights.faithfulness,
                    monosemanticity_weight=weights.monosemanticity,
                    task_weight=weights.task,
                )
            )
        return rows


class Evaluator:
    """Evaluates decoders on the same prompts and the same cached tokens.

    Args:
        lm: the frozen model.
        activations: folder of the activation cache.
        split: "validation" while training goes on, "test" for verdicts.
        suite: which tasks.
        num_prompts: prompts a task.
        num_tokens: cached tokens.
        seed: of prompts and bootstrap.
    """

    def __init__(
        self,
        lm: FrozenLM,
        activations: Path,
        *,
        split: str,
        suite: TaskSuite,
        num_prompts: int,
        num_tokens: int,
        seed: int,
    ) -> None:
        self.lm, self.num_tokens, self.seed = lm, num_tokens, seed
        self.reader = ActivationReader(activations, split)
        held_out: Split = "test" if split == "test" else "validation"
        self.prompts = [
            prompt
            for name in suite.names
            for prompt in suite.make(name, held_out, num_prompts, seed, repeat_facts=True)
        ]
        check_lengths(lm, self.prompts)
        self.stop_ids, self.end_ids = newline_token_ids(lm.tokenizer), lm.end_token_ids

    def tasks(self, model: Any) -> TaskResult:
        """Greedy task scores of a causal LM (frozen model or decoder)."""
        return run_task(
            prefix_generate(model),
            self.prompts,
            self.lm.tokenizer,
            batch_size=32,
            device=self.lm.device,
            stop_ids=self.stop_ids,
            end_ids=self.end_ids,
        )

    def text(self, decoder: SaeDecoderForCausalLM) -> Faithfulness:
        """Faithfulness on held-out text."""
        return evaluate_faithfulness(
            decoder, self.reader, max_tokens=self.num_tokens, seed=self.seed
        )

    def kl(self, decoder: SaeDecoderForCausalLM) -> float:
        """KL(frozen || decoder) on held-out text in nats per token, in float32."""
        with matmul_precision("highest"):
            return self.text(decoder).kl

    def __call__(self, decoder: SaeDecoderForCausalLM) -> Evaluation:
        """Both, in float32."""
        with matmul_precision("highest"):
            return Evaluation(self.tasks(decoder), self.text(decoder))
