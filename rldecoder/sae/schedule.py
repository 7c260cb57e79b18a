"""Learning rate and sparsity coefficient as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rldecoder.config.sae import SparsityPhase, TrainSaeConfig


def learning_rate(config: TrainSaeConfig, step: int, num_steps: int) -> float:
    """The rate of step 0 <= step < num_steps: linear rise, plateau, linear fall to `lr_final`."""
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    start = config.decay_from * num_steps
    fall = max(0.0, (step + 1 - start) / max(num_steps - start, 1.0))
    plateau = config.lr + min(fall, 1.0) * (config.lr_final - config.lr)
    return rise * plateau


def learning_rate_scale(config: TrainSaeConfig, num_latents: int) -> float:
    """What both rates are multiplied by for a dictionary of this size."""
    reference = config.lr_reference_latents
    return 1.0 if reference is None else math.sqrt(reference / num_latents)


def sparsity_coefficient(phases: Sequence[SparsityPhase], warmup_steps: int, step: int) -> float:
    """The L1 coefficient of a step: the phase it falls in, times a linear warm-up."""
    rise = min(1.0, (step + 1) / (warmup_steps + 1))
    end = 0
    for phase in phases:
        end += phase.steps
        if step < end:
            return rise * phase.coefficient
    return rise * phases[-1].coefficient
