"""Settings of PPO, of its controls and of the freeze verdict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rldecoder.config.base import Config, OnFail, StageConfig, free, late
from rldecoder.config.tasks import FileTask, TaskName

FurtherArm = Literal["reverse_distillation", "gold_answers", "correct_teacher"]
Share = Annotated[float, Field(gt=0, le=1)]


class PpoStage(Config):
    """One stretch of training with its own reward weights."""

    steps: int = Field(ge=1)
    """PPO steps: each samples one batch of rollouts and runs the inner epochs on it."""
    faithfulness: float = Field(ge=0)
    """Weight of the faithfulness reward (nats per token) and of the differentiable KL loss."""
    monosemanticity: float = Field(ge=0)
    """Weight of the monosemanticity reward (0 to 1) and of the contribution-entropy loss."""
    task: float = Field(ge=0)
    """Weight of the verifiable task score (0 or 1 per response)."""


class PpoSettings(Config):
    """The optimiser, and what PPO is made of."""

    batch_size: int = Field(default=16, ge=2)
    """Responses sampled in a PPO step."""
    responses_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt of a step; divides `batch_size`. From 2 on, the mean reward of a
    prompt's other responses is taken off each one's (leave-one-out): what is left for the critic
    and the advantages is what the responses differ in, not how hard their prompts are."""
    minibatches: int = Field(default=1, ge=1)
    """Parts that each inner epoch splits the batch into; divides `batch_size`."""
    inner_epochs: int = Field(default=3, ge=1)
    """Passes over each batch of rollouts."""
    clip_coef: float = Field(default=0.2, gt=0)
    """Half-width of the interval that the probability ratio is clipped to."""
    gamma: float = Field(default=0.99, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """0: one-step TD; 1: Monte Carlo."""
    entropy_coef: float = Field(default=0.01, ge=0)
    """Weight of the entropy bonus (nats per token)."""
    faithfulness_reward: bool = late(True)
    """Whether log p_frozen(a) - log pi(a) is part of the reward. False, with `response_kl_factors`
    of 0, leaves the frozen model no word in what is a good response."""
    kl_penalty: float = Field(default=0.1, ge=0)
    """Weight of log pi(a) - log reference(a), the reference being the supervised decoder."""
    consistency: float = Field(default=0.25, ge=0, le=1)
    """Share of the monosemanticity reward's weight that goes to consistency (equal tokens carried
    by equal latents); the rest goes to sparsity (few latents carry a token)."""
    policy_coef: float = Field(default=1.0, ge=0)
    """Weight of the advantages; 0 leaves only the differentiable losses (an ablation)."""
    loss_type: Literal["bnpo", "grpo"] = "bnpo"
    """How the surrogate is averaged, by TRL's names: `bnpo` over all tokens of the minibatch,
    `grpo` over each response and then over responses, so that a task with short answers counts
    as much as one with long ones."""
    kl_loss_coef: float = Field(default=1.0, ge=0)
    """Weight of KL(frozen || decoder) as a loss, times the stage's faithfulness weight."""
    response_kl_factors: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """What that weight is multiplied by on the responses of a task; 1 where it is not named, and on
    replayed text. Where the frozen model answers badly, its distribution holds the decoder to bad
    answers; 0 leaves the responses of a task to the reward."""
    sparsity_loss_coef: float = Field(default=3.0, ge=0)
    """Weight of the contribution entropy (0 to 1, on responses and on replayed text) as a loss,
    times the monosemanticity weight. 0.1 does not move it."""
    replay_tokens: int = Field(default=256, ge=0)
    """Training-text tokens on which both losses are also taken in each optimiser step, other ones
    in each; 0: rollouts only. Decoders with blocks take whole sequences: rounded down, at least
    one.
    Without them the decoder drifts away on text that is no task prompt."""
    replay_source: Literal["cache", "stream"] = late("cache")
    """`cache` reads that text from the train split of `cache_activations`; `stream` runs the frozen
    model over `ingest`'s train split as training goes on, for a buffer that no disk holds."""
    replay_window_bytes: int = late(1 << 28, gt=0)
    """Text that is shuffled together occupies at most this much memory. A stream computes a window
    at a time, the last one whole: a short training on a slow device wants a small one."""
    lr: float = Field(default=2e-5, gt=0)
    """Peak learning rate of the map from latents (Adam)."""
    blocks_lr: float = Field(default=1e-5, gt=0)
    """The same for the blocks of a decoder that has some."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Adam's eps for the map from latents. Rows of rare latents have gradients from a token or two;
    with a small eps they move by whole steps all the same."""
    critic_lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the critic."""
    critic_width: int = Field(default=128, ge=1)
    """Hidden units of the critic."""
    warmup_steps: int = Field(default=500, ge=0)
    """Optimiser steps of linear warm-up, at most a tenth of all; then linear decay to 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clip, of decoder and critic separately."""
    interpolation: tuple[Share, ...] = Field(default=(1.0,), min_length=1)
    """Where the published weights may lie on the line from the supervised decoder (0) to the end of
    training (1); of the trained controls too. Short of the end, held-out KL falls sooner than the
    task score: much of the way is noise of the optimiser. Of several shares the largest is taken
    whose KL on validation text is within `interpolation_max_kl`, or the one of least KL."""
    interpolation_max_kl: float = Field(default=0.0, ge=0)
    """Nats per token that validation KL may lie above the supervised decoder's at that share."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling, and therefore of scoring too."""
    matmul_precision: Literal["highest", "high", "medium"] = "medium"
    """Of the products in scoring and in the inner epochs; `medium` multiplies in bfloat16 where
    the hardware can. Sampling and evaluation are always in float32."""

    @property
    def replays(self) -> bool:
        """Whether any loss is taken on text beside the rollouts."""
        return self.replay_tokens > 0 and max(self.kl_loss_coef, self.sparsity_loss_coef) > 0

    @model_validator(mode="after")
    def _check(self) -> PpoSettings:
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"minibatches={self.minibatches} must divide batch_size={self.batch_size}"
            )
        if self.batch_size % self.responses_per_prompt:
            raise ValueError(
                f"responses_per_prompt={self.responses_per_prompt} must divide "
                f"batch_size={self.batch_size}"
            )
        return self


class AdaptiveRule(Config):
    """The plan's rule that shifts the reward weights, applied at each evaluation."""

    kl_target: float = Field(default=0.5, ge=0)
    """Held-out KL (nats per token) below which faithfulness is weighed less."""
    faithfulness_factor: float = Field(default=0.95, gt=0)
    """What its weight is multiplied by then."""
    latents_target: float = Field(default=120.0, ge=0)
    """Effective latents a token above which monosemanticity is weighed more."""
    monosemanticity_factor: float = Field(default=1.1, gt=0)
    """What its weight is multiplied by then."""


class CollapseRule(Config):
    """When training is stopped because it has gone wrong."""

    min_entropy_fraction: float = Field(default=0.02, ge=0)
    """Of the first step's entropy; less for `patience` steps in a row stops training."""
    max_clip_fraction: float = Field(default=0.5, gt=0)
    """Share of clipped tokens; more for `patience` steps in a row stops training."""
    max_kl_increase: float = Field(default=1.0, gt=0)
    """Nats per token that held-out KL may rise above its start."""
    patience: int = Field(default=5, ge=1)
    """Bad steps in a row that count as collapse."""


class TrainPpoConfig(StageConfig):
    """PPO on the feature decoder, in stages of different reward weights."""

    tasks: tuple[TaskName, ...] = ("addition", "cloze")
    """Generated tasks. Each batch holds an equal share of each task but for `task_turns`."""
    file_tasks: tuple[FileTask, ...] = ()
    """Tasks from files (SQuAD, GSM8K, BoolQ, or one's own)."""
    task_turns: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Prompts that a task gets in each round of training; 1 where it is not named. Short answers
    are cheap: with {cloze: 3} three cloze questions are asked for each addition."""
    seeds: int = Field(default=1, ge=1)
    """Trainings from the same decoder with other random numbers. The first one is published as
    `decoder/`, whatever the others reach; `control_ppo` judges all of them."""
    stages: tuple[PpoStage, ...] = Field(
        default=(
            PpoStage(steps=3, faithfulness=0.5, monosemanticity=0.3, task=0.2),
            PpoStage(steps=6, faithfulness=0.4, monosemanticity=0.3, task=0.3),
            PpoStage(steps=3, faithfulness=0.3, monosemanticity=0.2, task=0.5),
        ),
        min_length=3,
        max_length=3,
    )
    """The three stages, in order."""
    ppo: PpoSettings = PpoSettings()
    """PPO itself."""
    adaptive: AdaptiveRule = AdaptiveRule()
    """Adaptive reward weights."""
    collapse: CollapseRule = CollapseRule()
    """Early stop."""
    eval_every_steps: int = Field(default=6, ge=1)
    """PPO steps between evaluations (also at the start and at each stage's end)."""
    eval_prompts: int = Field(default=8, ge=1, le=64)
    """Validation prompts a task."""
    eval_tokens: int = Field(default=512, ge=1)
    """Cached validation tokens for held-out KL."""
    checkpoint_every_steps: int = free(4, ge=1)
    """PPO steps between checkpoints."""

    @model_validator(mode="after")
    def _check(self) -> TrainPpoConfig:
        names = [*self.tasks, *(task.name for task in self.file_tasks)]
        if not names:
            raise ValueError("tasks and file_tasks are both empty: PPO has nothing to ask")
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have the same name among {', '.join(names)}")
        of_tasks: dict[str, Iterable[str]] = {
            "task_turns": self.task_turns,
            "ppo.response_kl_factors": self.ppo.response_kl_factors,
        }
        for setting, tasks in of_tasks.items():
            unknown = ", ".join(sorted(set(tasks) - set(names)))
            if unknown:
                raise ValueError(f"{setting} names {unknown}, but the tasks are {', '.join(names)}")
        return self


class ControlPpoConfig(StageConfig):
    """Controls, judged on task score and held-out KL; length, seeds and settings of train_ppo."""

    test_prompts: int = Field(default=24, ge=1, le=240)
    """Test prompts a task, the same for every system. Clozes beyond 64, additions beyond 48, ask
    for a fact or a pair again; intervals count it once (they resample facts and pairs)."""
    test_tokens: int = Field(default=1024, ge=1)
    """Cached test tokens for held-out KL."""
    supervised_continuation: bool = True
    """Also train as long with the KL loss on text alone (more supervised training, which gates),
    and with the differentiable losses alone, at their full weight on all responses (what does the
    reward add to distillation? measured beside the verdict)."""
    further_arms: tuple[FurtherArm, ...] = late(())
    """Trainings of the same length beside these, which gate nothing: distillation by the reverse
    KL on own responses, and cross-entropy on the right answers of the same prompts, or on those of
    the frozen model's own samples that are right."""
    max_kl_increase: float = Field(default=0.05, ge=0)
    """Held-out KL above the supervised decoder's, nats per token, that the verdict allows."""
    checkpoint_every_steps: int = free(4, ge=1)
    """PPO steps between checkpoints of the trained controls."""
    on_fail: OnFail = free("stop")
    """What the runner does when a control comes near the trained decoder."""


class FreezeDecoderConfig(StageConfig):
    """Which decoder is published as final, and whether it counts as frozen."""

    max_kl: float = Field(default=0.5, gt=0)
    """Held-out KL(frozen || decoder) in nats per token below which the decoder may be frozen."""
    max_task_drop: float = Field(default=0.03, ge=0)
    """Task score below the frozen model's that is still accepted (0.03: three points of 100)."""
    max_kl_above_supervised: float = Field(default=0.05, ge=0)
    """The PPO decoder is passed over when its held-out KL exceeds the supervised one's by more."""
