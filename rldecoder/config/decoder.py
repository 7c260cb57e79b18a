"""Configuration of the supervised decoder and of its gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rldecoder.config.base import OnFail, StageConfig, free

MatmulPrecision = Literal["highest", "high", "medium"]


class TrainDecoderConfig(StageConfig):
    """Distil the frozen model's logits into the feature decoder."""

    epochs: int = Field(3, ge=1)
    """Passes over the training tokens; validation and OOD are measured after each."""
    budget_tokens: int | None = Field(75_000, ge=1)
    """Training tokens over all epochs together; null takes all cached ones in every epoch."""
    batch_tokens: int = Field(1024, ge=1)
    """Tokens an optimiser step."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate (AdamW), after warm-up, then cosine to 0. A step moves every active row
    at once: with 64 latents of activation 17 (SmolLM2, layer 24) 1e-4 is at the edge of divergence
    and 1e-3 is far beyond it."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of all steps over which the learning rate rises linearly."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay of W; the bias has none. It pulls W to 0, not to the affine lens."""
    ce_weight: float = Field(0.1, ge=0, le=1)
    """Share of the cross-entropy to the real next token in the loss; the rest is KL."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient of all weights together is clipped to this norm."""
    validation_tokens: int = Field(4096, ge=2)
    """Validation tokens measured after every epoch; their KL chooses the best epoch."""
    ood_tokens: int = Field(2048, ge=2)
    """Out-of-domain tokens measured after every epoch."""
    matmul_precision: MatmulPrecision = "medium"
    """Of the products with the unembedding. `medium`: bfloat16 factors, float32 sums and logits
    (where the hardware has them); `highest`: float32."""
    checkpoint_every_steps: int = free(50, ge=1)
    """Optimiser steps between checkpoints; a killed run goes on from the last one."""


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
