"""When has PPO gone wrong? A rule that looks at each step and at each evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rldecoder.config.rl import CollapseRule

STUCK_CLIP_FRACTION = 0.4
"""Of the first step: a peaked start, from which clipped updates hardly get away (RL.md)."""


class CollapseWatch:
    """Counts bad steps in a row; each method returns a reason to stop, or None."""

    def __init__(self, rule: CollapseRule) -> None:
        self.rule = rule
        self.first_entropy: float | None = None
        self.start_kl: float | None = None
        self.low_entropy_steps = 0
        self.clipped_steps = 0

    def after_step(self, metrics: Mapping[str, float]) -> str | None:
        """Look at a PPO step's `entropy` (nats) and `clip_fraction`."""
        entropy, clipped = metrics["entropy"], metrics["clip_fraction"]
        if self.first_entropy is None:
            self.first_entropy = entropy
        floor = self.rule.min_entropy_fraction * self.first_entropy
        self.low_entropy_steps = self.low_entropy_steps + 1 if entropy < floor else 0
        too_much = clipped > self.rule.max_clip_fraction
        self.clipped_steps = self.clipped_steps + 1 if too_much else 0
        if self.low_entropy_steps >= self.rule.patience:
            return (
                f"entropy {entropy:.4f} nats stayed below {floor:.4f} for "
                f"{self.low_entropy_steps} steps: the policy says one thing only. "
                "Raise train_ppo.ppo.entropy_coef or lower its lr."
            )
        if self.clipped_steps >= self.rule.patience:
            return (
                f"clip fraction {clipped:.2f} stayed above {self.rule.max_clip_fraction} for "
                f"{self.clipped_steps} steps: updates are too large. Lower train_ppo.ppo.lr."
            )
        return None

    def warning(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A sign of trouble that does not stop training."""
        if step == 0 and metrics["clip_fraction"] > STUCK_CLIP_FRACTION:
            return (
                f"The first step clipped {metrics['clip_fraction']:.0%} of the tokens: the policy "
                "starts peaked and may get stuck. Lower train_ppo.ppo.lr."
            )
        return None

    def after_evaluation(self, kl: float) -> str | None:
        """Look at held-out KL(frozen || decoder), nats per token; the first call is the start."""
        if self.start_kl is None:
            self.start_kl = kl
        if kl - self.start_kl > self.rule.max_kl_increase:
            return (
                f"held-out KL rose from {self.start_kl:.2f} to {kl:.2f} nats: the decoder leaves "
                "the frozen model. Lower train_ppo.ppo.lr or raise kl_loss_coef and kl_penalty."
            )
        return None

    def state(self) -> dict[str, Any]:
        """JSON form for checkpoints."""
        return {name: value for name, value in vars(self).items() if name != "rule"}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        vars(self).update(state)
