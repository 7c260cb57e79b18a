"""Cached training text on which the KL loss is taken beside the rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch
from rldecoder.sae.model import Sae
from rldecoder.sae.selection import SparseLatents


class ReplayBatch(NamedTuple):
    """Cached text tokens on which the KL loss is taken too."""

    latents: SparseLatents
    """[N, K]"""
    frozen_hidden: Tensor
    """[N, D]"""
    seq_id: Tensor
    """[N]"""
    pos: Tensor
    """[N]"""


class Replay:
    """Training text for the KL loss: one batch an optimiser step, the same for the same step.

    Args:
        activations: folder of the activation cache.
        sae: encodes it.
        num_tokens: a batch.
        seed: of the order.
        sequences: whole sequences, for decoders that look back; else rows from anywhere.
    """

    def __init__(
        self, activations: Path, sae: Sae, num_tokens: int, seed: int, *, sequences: bool = False
    ) -> None:
        self.sae, self.seed = sae, seed
        reader = self.reader = ActivationReader(activations, "train", window_bytes=1 << 28)
        self.num_tokens = min(num_tokens, reader.num_tokens)
        self._shuffled: Callable[..., Iterator[ActivationBatch]]
        if sequences:
            size = max(1, self.num_tokens // reader.meta.context_length)
            self._shuffled, self._size = reader.shuffled_sequences, size
            self._batches_per_epoch = reader.sequence_batches(size)
        else:
            self._shuffled, self._size = reader.shuffled, self.num_tokens
            self._batches_per_epoch = reader.batches_per_epoch(self.num_tokens)
        self._next_step = -1
        self._batches: Iterator[ActivationBatch] = iter(())

    @torch.no_grad()
    def __call__(self, step: int) -> ReplayBatch:
        """The batch of an optimiser step, encoded."""
        epoch, place = divmod(step, self._batches_per_epoch)
        if step != self._next_step or place == 0:
            self._batches = self._shuffled(
                self._size,
                seed=self.seed,
                epoch=epoch,
                start_batch=place,
                columns=("resid", "final_hidden"),
            )
        self._next_step = step + 1
        batch = next(self._batches).to(self.sae.W_dec.device)
        assert batch.resid is not None
        assert batch.final_hidden is not None
        latents = self.sae.encode(batch.resid.float())
        return ReplayBatch(latents, batch.final_hidden, batch.seq_id, batch.pos)
