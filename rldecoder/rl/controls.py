"""Is the trained decoder better than chance, and than more supervised training?

What the reward adds to distillation is measured by the same comparison, and does not decide.

A random reward is not inert: whitened noise sharpens the policy (entropy 2.46 -> 1.30)
while nothing is learned. So controls are compared on task score and held-out KL only, on the same
test prompts and the same test text, by paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import VectorColumn
from rldecoder.decoder.distill import chunk_rows
from rldecoder.decoder.faithfulness import Predictor
from rldecoder.decoder.sequences import whole_sequences
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.evals.statistics import (
    MeanInterval,
    Measured,
    crossed_bootstrap,
    wilson_interval,
)
from rldecoder.evals.tasks import TaskResult, summarise, task_row
from rldecoder.lm.frozen import FrozenLM
from rldecoder.rl.policy import token_stats
from rldecoder.rl.spread import Spread, sequence_means
from rldecoder.schemas import JsonRecord, Scalar, table_schema
from rldecoder.seeds import torch_generator

Key = TypeVar("Key")

TRAINED = "trained"
TRAINED_END = "trained_end"
"""The trained decoder at the end of its training, where the published one lies short of it."""
SUPERVISED = "supervised"
FROZEN = "frozen"

BESIDE = {
    "losses_only": "distillation on own responses",
    "reverse_distillation": "distillation on own responses by the reverse KL",
    "gold_answers": "cross-entropy on the right answers of the same prompts",
    "correct_teacher": "cross-entropy on the frozen model's own answers that are right",
}
"""Trainings without a reward that are measured beside the verdict, in words."""


class System(NamedTuple):
    """One policy on the test split, from one training or several."""

    name: str
    tasks: list[TaskResult]
    """One a training, on the same prompts."""
    kl: NDArray[np.float64]
    """[S, sequences]: mean KL(frozen || system) of each test sequence, nats per token."""
    gates: bool = False
    """Whether it is a control that the trained decoder must beat."""
    spread: Sequence[Spread] = ()
    """One a training, on the test sequences; none for systems without latents."""

    @property
    def scores(self) -> Float[np.ndarray, "seeds prompts"]:
        """[S, prompts]"""
        return np.array([result.scores for result in self.tasks])

    @property
    def entropy(self) -> Float[np.ndarray, "seeds sequences"]:
        """[S, sequences] contribution entropy."""
        return np.array([spread.entropy for spread in self.spread])

    def training(self, number: int) -> System:
        """One training by itself; what was not trained as often is the same beside each."""
        if len(self.tasks) == 1:
            number = 0
        only = slice(number, number + 1)
        return System(
            self.name, self.tasks[only], self.kl[only], self.gates, list(self.spread)[only]
        )


class Comparison(JsonRecord):
    """The trained decoder against another system; differences are positive when it is better.

    Each with its 95 % interval, `_low` to `_high`."""

    control: str
    """The other system's name."""
    score_difference: float
    """Task score of the trained decoder minus the control's, 0 to 1."""
    score_low: float
    score_high: float
    score_pvalue: float
    """One-sided."""
    kl_difference: float
    """KL(frozen || control) minus that of the trained decoder on test text, nats per token."""
    kl_low: float
    kl_high: float
    beaten: bool
    """Whether the interval of the task score lies above 0."""
    entropy_difference: float | None
    """Contribution entropy of the control minus that of the trained decoder, on test text; None
    for systems without latents."""
    entropy_low: float | None
    entropy_high: float | None

    def reason(self) -> str:
        """One sentence for a control that was not beaten."""
        return f"control {self.control} comes near the trained decoder: {self._numbers()}"

    def no_gain(self) -> str:
        """One sentence for a start that was not improved on."""
        return (
            f"PPO is not clearly better than the {self.control} decoder it started from: "
            f"{self._numbers()}"
        )

    def too_far(self, bound: float) -> str:
        """One sentence for a KL that rose too much."""
        return (
            f"PPO raised held-out KL above the {self.control} decoder's by "
            f"{-self.kl_difference:.3f} [{-self.kl_high:.3f}, {-self.kl_low:.3f}] nats per token "
            f"(allowed {bound:g})"
        )

    def beside(self) -> str:
        """What the reward adds to a training of BESIDE, as a sentence; it decides nothing."""
        return (
            f"the reward adds {self.score_difference:+.2f} [{self.score_low:+.2f}, "
            f"{self.score_high:+.2f}] of task score to {BESIDE[self.control]}, which has "
            f"held-out KL {'higher' if self.kl_difference > 0 else 'lower'} by "
            f"{abs(self.kl_difference):.3f} nats (measured beside the verdict, no part of it)"
        )

    def _numbers(self) -> str:
        return (
            f"beside it the trained one's task score is {self.score_difference:+.2f} "
            f"[{self.score_low:+.2f}, {self.score_high:+.2f}] and its held-out KL "
            f"{-self.kl_difference:+.3f} [{-self.kl_high:+.3f}, {-self.kl_low:+.3f}] nats"
        )


class SystemRow(JsonRecord):
    """One system on the prompts of one task, or of all: a row of CONTROLS.

    Each measure with its 95 % interval, `_low` to `_high`."""

    system: str
    """Its name."""
    gates: bool
    """Whether it is a control that the verdict depends on."""
    task: str
    """The task, or `all`."""
    score: float
    """Mean task score over prompts and trainings, 0 to 1."""
    score_low: float
    score_high: float
    num_prompts: int
    """Test prompts."""
    num_trainings: int
    """Trainings (seeds) that the means are over."""
    kl: float
    """KL(frozen || system) on test text, nats per token."""
    kl_low: float
    kl_high: float
    contribution_entropy: float | None
    """Of the latents' contributions to first choices, 0 to 1; None for systems without latents."""
    contribution_entropy_low: float | None
    contribution_entropy_high: float | None
    effective_latents: float | None
    """Effective number of latents that carry a first choice; None as above."""


CONTROLS = table_schema(SystemRow)
"""One row a system and task (and `all`), on the test split. `gates`: a control that the verdict
depends on. `kl` is KL(frozen || system) in nats per token. The last four are of the contributions
to first choices on test text, null for systems without latents. Intervals are 95 %."""


class TrainingScore(JsonRecord):
    """One training of the trained decoder by itself."""

    score: float
    """Task score, 0 to 1."""
    kl: float
    """KL(frozen || decoder) on test text, nats per token."""
    not_beaten: tuple[str, ...] | None = None
    """Gating controls that it does not clearly beat by itself; None where no one asked."""
    drop: Measured | None = None
    """Task score of the frozen model minus its own, on the same prompts; None in older records."""


class ControlVerdict(JsonRecord):
    """What the controls say about the training."""

    verdict: Literal["pass", "fail"]
    """Whether all gating controls are clearly beaten and held-out KL did not rise too far."""
    reasons: tuple[str, ...]
    """Why not, and what a reader must know."""
    beside: tuple[str, ...] = ()
    """What was measured beside the verdict and is no part of it, in sentences."""
    comparisons: tuple[Comparison, ...]
    """The trained decoder against each other system but the frozen model."""
    systems: dict[str, SystemRow]
    """Every system over all tasks, by name."""
    trainings: tuple[TrainingScore, ...]
    """The trained decoders, in the order of their seeds."""
    supervised_drop: Measured | None = None
    """`TrainingScore.drop` of the decoder that they started from."""
    response_entropy: dict[str, float]
    """Contribution entropy on own sampled responses by system, and how far it fell from the
    supervised decoder's (`fall`) with its 95 % interval (`fall_low`, `fall_high`)."""
    response_effective_latents: dict[str, float]
    """Effective number of latents on own responses, by system."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """Task score and KL of every system; what the latents do, where it was measured."""
        numbers: dict[str, Scalar] = {}
        for name, row in self.systems.items():
            numbers[f"{name}_task_score"] = row.score
            numbers[f"{name}_kl"] = row.kl
        for name, effective in self.response_effective_latents.items():
            numbers[f"{name}_contribution_entropy"] = self.systems[name].contribution_entropy
            numbers[f"{name}_response_entropy"] = self.response_entropy[name]
            numbers[f"{name}_response_effective_latents"] = effective
        return numbers


def compare(trained: System, control: System, seed: int) -> Comparison:
    """Paired differences of task score and of KL (over sequences), with 95 % intervals.

    Prompts are resampled by group: one sum in several wordings is one question.
    And of contribution entropy (over sequences), which does not decide anything.
    All over trainings as well, where there are several; a control trained as often is paired by
    number. The control is beaten when the interval of the task score lies above 0: that is what the
    reward is for, and held-out KL may not be bought with it (`ControlPpoConfig.max_kl_increase`).
    """
    groups = trained.tasks[0].groups
    score = crossed_bootstrap(trained.scores - control.scores, seed=seed, groups=groups)
    kl = crossed_bootstrap(control.kl - trained.kl, seed=seed)
    entropy = None
    if control.spread and trained.spread:
        entropy = crossed_bootstrap(control.entropy - trained.entropy, seed=seed)
    return Comparison(
        control=control.name,
        score_difference=score.difference,
        score_low=score.low,
        score_high=score.high,
        score_pvalue=score.pvalue,
        kl_difference=kl.difference,
        kl_low=kl.low,
        kl_high=kl.high,
        beaten=bool(score.low > 0),
        entropy_difference=entropy.difference if entropy else None,
        entropy_low=entropy.low if entropy else None,
        entropy_high=entropy.high if entropy else None,
    )


def task_drop(system: System, frozen: System, seed: int) -> Measured:
    """How far a system's task score lies below the frozen model's, with its 95 % interval."""
    ahead = compare(system, frozen, seed)
    value, low, high = ahead.score_difference, ahead.score_low, ahead.score_high
    return Measured(value=0 - value, low=0 - high, high=0 - low)  # zero without a sign


def each_training(
    trained: System, controls: Sequence[System], frozen: System, seed: int
) -> tuple[TrainingScore, ...]:
    """Every training against the gating controls of its own number, for `TrainingScore`.

    Args:
        controls: all other systems.
    """
    gating = [control for control in controls if control.gates]
    return tuple(
        TrainingScore(
            score=result.score,
            kl=float(trained.kl[number].mean()),
            not_beaten=tuple(
                control.name
                for control in gating
                if not compare(trained.training(number), control.training(number), seed).beaten
            ),
            drop=task_drop(trained.training(number), frozen, seed),
        )
        for number, result in enumerate(trained.tasks)
    )


def uniform_policy(prompts: Sequence[TaskPrompt], lm: FrozenLM, seed: int) -> TaskResult:
    """Task score of answers made of uniformly random tokens."""
    generator = torch_generator(seed, "uniform-policy")
    rows = []
    for prompt in prompts:
        length = prompt.max_new_tokens
        ids = torch.randint(len(lm.tokenizer), (length,), generator=generator)
        text = lm.tokenizer.batch_decode([ids.tolist()], skip_special_tokens=True)[0]
        rows.append(task_row(prompt, text))
    return summarise(rows)


def uniform_predictor(lm: FrozenLM) -> Predictor:
    """Final hidden states of zeros: all logits equal (up to a bias of the output layer)."""

    def predict(batch: Any) -> Tensor:
        return torch.zeros(len(batch.pos), lm.d_model, device=lm.device)

    return predict


@torch.no_grad()
def sequence_kl(
    predictors: Mapping[Key, Predictor], reader: ActivationReader, lm: FrozenLM, num_tokens: int
) -> dict[Key, Float[np.ndarray, " sequences"]]:
    """Mean KL(frozen || predictor) of each sequence, nats per token, on the first rows of a split.

    All predictors see the same rows, so that differences can be paired.
    """
    rows = chunk_rows(lm.vocab_size)
    kl: dict[Key, list[Tensor]] = {name: [] for name in predictors}
    sequences = []
    columns: tuple[VectorColumn, ...] = ("resid", "final_hidden")
    for batch in whole_sequences(reader, 2048, columns=columns, max_tokens=num_tokens):
        assert batch.final_hidden is not None
        predicted = {name: predict(batch) for name, predict in predictors.items()}
        for start in range(0, len(batch.pos), rows):
            part = slice(start, start + rows)
            frozen = lm.unembed(batch.final_hidden[part].to(lm.device)).log_softmax(-1)
            tokens = batch.token_id[part].to(lm.device)
            for name, hidden in predicted.items():
                stats = token_stats(hidden[part], tokens, lm.unembed, frozen_logprobs=frozen)
                kl[name].append(stats.kl.cpu())
        sequences.append(batch.seq_id)
    seq_id = torch.cat(sequences)
    return {name: sequence_means(torch.cat(parts), seq_id) for name, parts in kl.items()}


def _score_interval(parts: Sequence[TaskResult], seed: int) -> MeanInterval:
    first = parts[0]
    scores, groups = np.array([part.scores for part in parts]), first.groups
    size = len(set(groups))
    if len(parts) == 1 and size == len(groups):
        return MeanInterval(first.score, first.ci_low, first.ci_high)
    if scores.max() == 0 or scores.min() == 1:
        # A bootstrap has no width there, however few the groups.
        return MeanInterval(first.score, *wilson_interval(first.score * size, size))
    mean = crossed_bootstrap(scores, seed=seed, groups=groups)
    return MeanInterval(mean.difference, mean.low, mean.high)


def control_rows(system: System, seed: int) -> list[SystemRow]:
    """Rows of CONTROLS. Wilson's interval for one training whose prompts are each a group of their
    own; else a bootstrap over groups of prompts, and over trainings where there are several."""
    # On test text, and so the same for every task.
    kl = crossed_bootstrap(system.kl, seed=seed)
    entropy = crossed_bootstrap(system.entropy, seed=seed) if system.spread else None
    effective = float(np.mean([one.effective for one in system.spread])) if system.spread else None

    first = system.tasks[0]
    rows = []
    for task in ["all", *dict.fromkeys(row.task for row in first.rows)]:
        parts = [result if task == "all" else result.of_task(task) for result in system.tasks]
        score = _score_interval(parts, seed)
        rows.append(
            SystemRow(
                system=system.name,
                gates=system.gates,
                task=task,
                score=score.mean,
                score_low=score.low,
                score_high=score.high,
                num_prompts=parts[0].n,
                num_trainings=len(parts),
                kl=kl.difference,
                kl_low=kl.low,
                kl_high=kl.high,
                contribution_entropy=entropy and entropy.difference,
                contribution_entropy_low=entropy and entropy.low,
                contribution_entropy_high=entropy and entropy.high,
                effective_latents=effective,
            )
        )
    return rows
