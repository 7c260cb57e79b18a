"""Training of explainers: one optimiser step of Method B, and of its ablation."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from rldecoder.config.explain import TrainExplainerConfig
from rldecoder.errors import NumericalError
from rldecoder.explain.explainer import Explainer, Slots, losses
from rldecoder.explain.pairs import Pairs


class Learner:
    """An explainer with its optimiser."""

    def __init__(
        self, explainer: Explainer, config: TrainExplainerConfig, *, regularised: bool
    ) -> None:
        """Prepare training.

        Args:
            regularised: whether the reconstruction error shapes the claims. Without it the
                reconstructor learns to read them just the same, but nothing flows back, and gates
                have no say.
        """
        self.explainer = explainer
        self.config = config
        self.regularised = regularised
        self._optimizer = torch.optim.AdamW(
            explainer.parameters(), lr=config.lr, weight_decay=config.weight_decay
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
            train: all pairs.
            rows: [B], which of them.

        Raises:
            NumericalError: the loss is not finite.
        """
        config = self.config
        parts = losses(
            self.explainer,
            slots,
            train.candidates.logprobs[rows],
            train.measured.single[rows],
            train.removals[rows],
            train.measured.joint[rows],
            train.measured.margins[rows] < 0,
            regularised=self.regularised,
        )

        # Whether another token leads counts as much as the effect itself: both are readings.
        loss = (
            parts.pointer
            + config.effect_weight * parts.effect
            + config.reconstruction_weight * (parts.reconstruction + parts.outcome)
            + config.length_weight * parts.length
        )
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
