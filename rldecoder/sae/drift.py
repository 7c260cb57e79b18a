"""Alerts when training drifts: each kind speaks once when it begins, and again if it comes back."""

from __future__ import annotations

from pydantic import BaseModel

from rldecoder.config.sae import TrainSaeConfig
from rldecoder.sae.architectures import ARCHITECTURES
from rldecoder.sae.training import StepResult

RUNNING_MEAN_DECAY = 0.98
LOSS_JUMP = 3.0
"""Multiple of its running mean above which the loss has jumped."""


class DriftState(BaseModel):
    """What a watch remembers; goes into checkpoints."""

    mean_loss: float | None = None
    """Running mean."""
    active: tuple[str, ...] = ()
    """What drifts now, and was told."""


class DriftWatch:
    """Compares every step with its recent past and with the bands of the config."""

    def __init__(self, config: TrainSaeConfig) -> None:
        self.config, self.state = config, DriftState()

    def observe(self, step: int, result: StepResult) -> list[str]:
        """Messages for what has just begun to drift; nothing during warm-up."""
        config = self.config
        mean = result.loss if self.state.mean_loss is None else self.state.mean_loss
        self.state.mean_loss = RUNNING_MEAN_DECAY * mean + (1 - RUNNING_MEAN_DECAY) * result.loss
        if step < ARCHITECTURES[config.architecture].settling_steps(config):
            return []
        low, high = config.alert_l0
        found = {}
        if result.loss > LOSS_JUMP * mean:
            found["loss"] = f"loss {result.loss:.4g} jumped above its running mean {mean:.4g}"
        if not low <= result.l0 <= high:
            found["l0"] = f"mean L0 {result.l0:.1f} is outside {low:g} to {high:g}"
        if result.dead_fraction > config.alert_dead_fraction:
            found["dead"] = (
                f"dead fraction {result.dead_fraction:.3f} exceeds {config.alert_dead_fraction:g}"
            )
        messages = [
            f"SAE training, step {step}: {text}."
            for kind, text in found.items()
            if kind not in self.state.active
        ]
        self.state.active = tuple(found)
        return messages
