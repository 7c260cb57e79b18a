"""Training of explainers: one optimiser step of Method B."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from rldecoder.config.explain import TrainExplainerConfig
from rldecoder.errors import NumericalError
from rldecoder.explain.explainer import Explainer, Slots, losses
from rldecoder.explain.pairs import Pairs

WEIGHT_DECAY = 0.01
EFFECT_WEIGHT = 1.0
"""Of the regression on exact effects, beside the pointers' cross-entropy."""


class Learner:
    """An explainer with its optimiser."""

    def __init__(self, explainer: Explainer, config: TrainExplainerConfig) -> None:
        self.explainer = explainer
        self._optimizer = torch.optim.AdamW(
            explainer.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY
        )
        warmup_steps = max(1, config.steps // 10)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: (
                min(1.0, (step + 1) / warmup_steps)
                * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
            ),
        )

    def step(self, slots: Slots, train: Pairs, rows: Int[Tensor, " places"]) -> dict[str, float]:
        """One step on some positions; returns the loss and its parts.

        Args:
            slots: of the positions.
            rows: [B], which of them.

        Raises:
            NumericalError: the loss is not finite.
        """
        parts = losses(self.explainer, slots, train.measured.single[rows])
        loss = parts.pointer + EFFECT_WEIGHT * parts.effect + parts.sure
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"The explainer's loss is {float(loss)} at step {self._schedule.last_epoch + 1}.",
                "Training diverged.",
                "Lower `train_explainer.lr`.",
            )

        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.explainer.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return {"loss": float(loss.detach())} | {
            name: float(value.detach()) for name, value in parts._asdict().items()
        }
