"""Held-out judgement of a decoder during PPO: task score and KL to the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
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

EVALUATIONS = pa.schema(
    [
        ("step", pa.int32()),
        ("stage", pa.int8()),
        ("task", pa.string()),
        ("score", pa.float64()),
        ("score_low", pa.float64()),
        ("score_high", pa.float64()),
        ("num_prompts", pa.int32()),
        ("kl", pa.float64()),
        ("kl_low", pa.float64()),
        ("kl_high", pa.float64()),
        ("accuracy", pa.float64()),
        ("agreement", pa.float64()),
        ("faithfulness_weight", pa.float64()),
        ("monosemanticity_weight", pa.float64()),
        ("task_weight", pa.float64()),
    ]
)
"""One row a task (and `all`) and evaluation on the validation split. `step` counts PPO steps done;
stage 0 is before training. Intervals are 95 % (Wilson; bootstrap over sequences)."""


class Evaluation(NamedTuple):
    """One evaluation."""

    tasks: TaskResult
    text: Faithfulness

    def rows(self, step: int, stage: int, weights: Sequence[float]) -> list[list[Any]]:
        """Rows of EVALUATIONS, as lists in the order of its columns."""
        names = ["all", *dict.fromkeys(row.task for row in self.tasks.rows)]
        out = []
        for name in names:
            part = self.tasks if name == "all" else self.tasks.of_task(name)
            score = [part.score, part.ci_low, part.ci_high, part.n]
            text = self.text
            kl = [text.kl, text.kl_low, text.kl_high, text.accuracy, text.agreement]
            out.append([step, stage, name, *score, *kl, *weights])
        return out


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
