"""Distilling the frozen model into a feature decoder: the step, its rates, its data.

The stage `train_decoder` adds evaluation and checkpoints, the frontier a budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rldecoder.config.decoder import DistillConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch, VectorColumn
from rldecoder.decoder.blocks import plain_attention
from rldecoder.decoder.distill import (
    LogitBuffers,
    NextTokens,
    TokenLosses,
    chunked_kl_ce,
    matmul_precision,
)
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.sequences import hidden_of_rows, in_parts
from rldecoder.errors import NumericalError
from rldecoder.optimizer_state import pack_optimizer, unpack_optimizer

WEIGHT_DECAY = 0.0
"""None: decay pulls W to 0, not to the affine lens that it starts from."""
PART_TOKENS = 4096
"""Larger batches are gone through in parts: memory does not grow with the batch."""


class StepValues(NamedTuple):
    """What one optimiser step reports; losses in nats per token."""

    loss: float
    kl: float
    ce: float
    grad_norm: float
    lr: float


class DecoderTrainer:
    """Trains a decoder on cached rows: shuffled ones for `linear`, whole sequences with blocks.

    Args:
        decoder: changed in place.
        config: rates, batch and budget.
        seed: of the order of the data.
    """

    def __init__(
        self,
        decoder: SaeDecoderForCausalLM,
        reader: ActivationReader,
        config: DistillConfig,
        seed: int,
    ) -> None:
        self.decoder, self.reader, self.config, self.seed = decoder, reader, config, seed
        self.next_tokens = NextTokens(reader)
        self.batch_sequences = max(1, config.batch_tokens // reader.meta.context_length)
        batches = (
            reader.sequence_batches(self.batch_sequences)
            if decoder.looks_back
            else reader.batches_per_epoch(config.batch_tokens)
        )
        self.steps_per_epoch = steps_per_epoch(batches, config)
        self.total_steps = config.epochs * self.steps_per_epoch
        self._buffers = LogitBuffers.kept(decoder.config.vocab_size)
        self.step_done = 0
        self.tokens_done = 0
        groups = [
            {"params": [decoder.W], "peak": config.lr},
            {"params": [decoder.b], "peak": config.lr},
        ]
        if blocks := list(decoder.upper.parameters()):
            groups.append({"params": blocks, "peak": config.blocks_lr})
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, weight_decay=WEIGHT_DECAY, fused=True
        )

    def rest_of_epoch(self) -> Iterator[ActivationBatch]:
        """The batches from `step_done` to the end of its epoch."""
        epoch, start = divmod(self.step_done, self.steps_per_epoch)
        columns: tuple[VectorColumn, ...] = ("resid", "final_hidden")
        whole, reader = self.decoder.looks_back, self.reader
        batches = (reader.shuffled_sequences if whole else reader.shuffled)(
            self.batch_sequences if whole else self.config.batch_tokens,
            seed=self.seed, epoch=epoch, start_batch=start, columns=columns,
        )  # fmt: skip
        for _, batch in zip(range(self.steps_per_epoch - start), batches, strict=False):
            yield batch

    def step(self, batch: ActivationBatch) -> StepValues:
        """One optimiser step on N tokens.

        Raises:
            NumericalError: the loss or the gradient is NaN or infinite.
        """
        config, decoder = self.config, self.decoder
        share = schedule(self.step_done, self.total_steps, config.warmup_fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share

        # Parts of the batch add up to its gradient; memory does not grow with it.
        self.optimizer.zero_grad(set_to_none=True)
        found = [self._backward(part, len(batch.pos)) for part in in_parts(batch, PART_TOKENS)]
        grad_norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.step_done += 1
        self.tokens_done += len(batch.pos)

        values = StepValues(
            loss=sum(float(losses.loss.sum()) for losses in found) / len(batch.pos),
            kl=sum(float(losses.kl.sum()) for losses in found) / len(batch.pos),
            ce=sum(float(losses.ce.sum()) for losses in found) / len(batch.pos),
            grad_norm=float(grad_norm),
            lr=config.lr * share,
        )
        if not all(map(math.isfinite, values)):
            raise NumericalError(
                f"Step {self.step_done} of decoder training gave {values._asdict()}.",
                "The decoder diverged, or the cached activations are damaged.",
                "Lower `train_decoder.lr` or `blocks_lr`; training goes on from the last "
                "checkpoint.",
            )
        return values

    def _backward(self, part: ActivationBatch, num_tokens: int) -> TokenLosses:
        """Add the gradient of a part of a batch of `num_tokens`; its losses."""
        decoder, device = self.decoder, self.decoder.device
        assert part.resid is not None
        assert part.final_hidden is not None
        with torch.no_grad():
            latents = decoder.frozen.sae.encode(part.resid.to(device).float())
        with matmul_precision(self.config.matmul_precision), self._attention():
            losses = chunked_kl_ce(
                hidden_of_rows(decoder, latents, part.seq_id, part.pos),
                part.final_hidden.to(device),
                decoder.frozen.lm,
                labels=self.next_tokens.labels(part.seq_id, part.pos).to(device),
                ce_weight=self.config.ce_weight,
                buffers=self._buffers,
            )
            (losses.loss.sum() / num_tokens).backward()
        return losses._replace(loss=losses.loss.detach())

    def _attention(self) -> AbstractContextManager[None]:
        """The fastest attention for the blocks."""
        short = self.reader.meta.context_length <= 512  # scores [B, heads, T, T] are kept
        on_cpu = self.decoder.device.type == "cpu"
        return plain_attention() if on_cpu and short else nullcontext()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON of a checkpoint; the inverse is `restore`."""
        tensors, optimizer = pack_optimizer(self.optimizer)
        tensors |= {f"now.{name}": t for name, t in self.decoder.state_dict().items()}
        return tensors, {"optimizer": optimizer, "tokens_done": self.tokens_done}

    def restore(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on as if training had never stopped after `step` steps."""
        weights = {n.removeprefix("now."): t for n, t in tensors.items() if n.startswith("now.")}
        self.decoder.load_state_dict(weights)
        unpack_optimizer(self.optimizer, tensors, state["optimizer"])
        self.step_done, self.tokens_done = step, int(state["tokens_done"])


def steps_per_epoch(batches: int, config: DistillConfig) -> int:
    """Optimiser steps between evaluations: one pass, or its share of the token budget."""
    if config.budget_tokens is None:
        return max(1, batches)
    return max(1, min(batches, config.budget_tokens // (config.epochs * config.batch_tokens)))


def schedule(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then half a cosine down to 0."""
    warmup = math.ceil(warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))
