"""What drives a training of equal length: a reward, noise, a teacher, right answers, text alone.

A kind differs from PPO in its rewards, its losses and whose responses it learns from; prompts,
text, steps and schedule are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rldecoder.config.rl import PpoSettings
from rldecoder.rl.learner import ResponseLoss
from rldecoder.rl.rollout import Answers

Kind = Literal[
    "trained",
    "random_reward",
    "losses_only",
    "text_only",
    "reverse_distillation",
    "gold_answers",
    "correct_teacher",
]
"""`trained`: everything. `random_reward`: noise as reward and no other loss.
`losses_only`: the differentiable losses without any reward, on its own responses and on text, the
KL loss at its full weight on the responses of all tasks, whatever `response_kl_factors` says.
`reverse_distillation`: the same with KL(decoder || frozen) on responses.
`gold_answers`: the same with cross-entropy on the right answers of the same prompts, which stand in
the place of responses. `correct_teacher`: the same with those of the frozen model's own samples
that are right; a prompt without one adds nothing.
`text_only`: the KL loss on text alone, which is what supervised training did."""

RESPONSE_LOSSES: dict[Kind, ResponseLoss] = {
    "reverse_distillation": "reverse_kl",
    "gold_answers": "gold",
    "correct_teacher": "right",
}
"""Of the kinds whose loss on responses is not KL(frozen || decoder)."""

ANSWERS: dict[Kind, Answers] = {"gold_answers": "gold", "correct_teacher": "teacher"}
"""Of the kinds whose responses are not the decoder's own."""


def asks_the_teacher(kind: Kind, settings: PpoSettings, tasks: Iterable[str]) -> bool:
    """Whether a reward or a loss on responses reads the frozen model's distribution."""
    if kind != "trained":
        return kind in ("losses_only", "reverse_distillation")
    factors = (settings.response_kl_factors.get(task, 1.0) for task in tasks)
    return settings.faithfulness_reward or any(factors)


def settings_of(ppo: PpoSettings, kind: Kind) -> PpoSettings:
    """The settings of training, less what a kind does without."""
    if kind == "random_reward":
        off = {"kl_loss_coef": 0.0, "sparsity_loss_coef": 0.0, "replay_tokens": 0}
        return ppo.model_copy(update=off)
    no_reward = {"policy_coef": 0.0, "entropy_coef": 0.0}
    if kind in ("losses_only", *RESPONSE_LOSSES):
        return ppo.model_copy(update={**no_reward, "response_kl_factors": {}})
    if kind == "text_only":
        return ppo.model_copy(update={**no_reward, "sparsity_loss_coef": 0.0})
    return ppo
