"""When has PPO gone wrong? A rule that looks at each step and at each evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from rldecoder.config.rl import CollapseRule

STUCK_CLIP_FRACTION = 0.4
"""Of the first step: a peaked start, from which clipped updates hardly get away."""


class CollapseState(BaseModel):
    """What a watch remembers; goes into checkpoints."""

    first_entropy: float | None = None
    start_kl: float | None = None
    low_entropy_steps: int = 0
    clipped_steps: int = 0


class CollapseWatch:
    """Counts bad steps in a row; each method returns a reason to stop, or None."""

    def __init__(self, rule: CollapseRule) -> None:
        self.rule, self.state = rule, CollapseState()

    def after_step(self, metrics: Mapping[str, float]) -> str | None:
        """Look at a PPO step's `entropy` (nats) and `clip_fraction`."""
        entropy, clipped, state = metrics["entropy"], metrics["clip_fraction"], self.state
        if state.first_entropy is None:
            state.first_entropy = entropy
        floor = self.rule.min_entropy_fraction * state.first_entropy
        state.low_entropy_steps = state.low_entropy_steps + 1 if entropy < floor else 0
        too_much = clipped > self.rule.max_clip_fraction
        state.clipped_steps = state.clipped_steps + 1 if too_much else 0
        if state.low_entropy_steps >= self.rule.patience:
            return (
                f"entropy {entropy:.4f} nats stayed below {floor:.4f} for "
                f"{state.low_entropy_steps} steps: the policy says one thing only. "
                "Raise train_ppo.ppo.entropy_coef or lower its lr."
            )
        if state.clipped_steps >= self.rule.patience:
            return (
                f"clip fraction {clipped:.2f} stayed above {self.rule.max_clip_fraction} for "
                f"{state.clipped_steps} steps: updates are too large. Lower train_ppo.ppo.lr."
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
        start = self.state.start_kl
        if start is None:
            start = self.state.start_kl = kl
        if kl - start > self.rule.max_kl_increase:
            return (
                f"held-out KL rose from {start:.2f} to {kl:.2f} nats: the decoder leaves "
                "the frozen model. Lower train_ppo.ppo.lr or raise kl_loss_coef and kl_penalty."
            )
        return None
