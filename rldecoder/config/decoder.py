"""Configuration of the supervised decoder and of its gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rldecoder.config.base import OnFail, StageConfig, free

MatmulPrecision = Literal["highest", "high", "medium"]


class DistillConfig(StageConfig):
    """How a feature decoder is distilled from the frozen model's logits."""

    epochs: int = Field(3, ge=1)
    """Passes over the training tokens; validation and OOD are measured after each."""
    budget_tokens: int | None = Field(75_000, ge=1)
    """Training tokens over all epochs together; null takes all cached ones in every epoch."""
    batch_tokens: int = Field(1024, ge=1)
    """Tokens an optimiser step; with blocks, whole sequences of about so many."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate (AdamW), after warm-up, then cosine to 0. A step moves every active row
    at once: with 64 latents of activation 17 (SmolLM2, layer 24) 1e-4 is at the edge of divergence
    and 1e-3 is far beyond it."""
    blocks_lr: float = Field(2e-4, gt=0)
    """The same for the blocks, their maps and their norm."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of all steps over which the learning rates rise linearly."""
    ce_weight: float = Field(0.1, ge=0, le=1)
    """Share of the cross-entropy to the real next token in the loss; the rest is KL."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient of all weights together is clipped to this norm."""
    matmul_precision: MatmulPrecision = "medium"
    """Of all matrix products. `medium`: bfloat16 factors, float32 sums and results (where the
    hardware has them); `highest`: float32."""
    init: Literal["base", "fresh"] = "base"
    """The blocks: the frozen model's own, joined by affine maps in closed form, or new ones."""
    fit_tokens: int = Field(16_384, ge=256)
    """Training tokens on which the affine maps between the blocks are fitted."""


class TrainDecoderConfig(DistillConfig):
    """Distil the frozen model's logits into the feature decoder."""

    depth: NonNegativeInt | Literal["auto"] = 0
    """Blocks over the positions: 0 is the linear decoder; `auto` takes what the frontier
    recommends at the hook layer."""
    validation_tokens: int = Field(4096, ge=2)
    """Validation tokens measured after every epoch; their KL chooses the best epoch."""
    ood_tokens: int = Field(2048, ge=2)
    """Out-of-domain tokens measured after every epoch."""
    checkpoint_every_steps: int = free(50, ge=1)
    """Optimiser steps between checkpoints; a killed run goes on from the last one."""


class FrontierConfig(StageConfig):
    """How faithful a decoder can be from each layer, at which depth and k."""

    depths: tuple[NonNegativeInt, ...] = ()
    """Blocks of the decoders; 0 is the linear one; none: no frontier."""
    layers: tuple[PositiveInt, ...] | None = None
    """Which of the sweep's layers; null: all of them."""
    ks: tuple[PositiveInt, ...] | None = None
    """Which of the sweep's k; null: all of them."""
    train_tokens: int = Field(100_000, ge=1024)
    """Tokens of `train` that the decoders see, an epoch."""
    test_tokens: int = Field(8192, ge=256)
    """Tokens of `test` that everything is measured on."""
    max_kl: float = Field(0.5, gt=0)
    """The KL to be reached, nats per token: the recommended depth is the least that does."""
    training: DistillConfig = DistillConfig(epochs=1, budget_tokens=100_000)
    """How every decoder is trained: the same budget for all."""
    micro_batch_sequences: int = free(8, ge=1)
    """Sequences per forward pass."""


class GateDecoderConfig(StageConfig):
    """Is the supervised decoder faithful enough to go on?"""

    max_kl: float = Field(1.5, gt=0)
    """The gate: largest KL(frozen || decoder) allowed on the test split, nats per token."""
    test_tokens: int = Field(4096, ge=2)
    """Test tokens measured."""
    ood_tokens: int = Field(2048, ge=2)
    """Out-of-domain tokens measured."""
    matmul_precision: MatmulPrecision = "medium"
    """As in train_decoder."""
    on_fail: OnFail = free("stop")
    """What the run does when the gate says no."""
