"""Cached training text on which the KL loss is taken beside the rollouts."""

from __future__ import annotations

from collections.abc import Iterator
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


class Replay:
    """Training text for the KL loss: one batch a PPO step, the same for the same step."""

    def __init__(self, activations: Path, sae: Sae, num_tokens: int, seed: int) -> None:
        self.sae, self.seed = sae, seed
        self.reader = ActivationReader(activations, "train", window_bytes=1 << 28)
        self.num_tokens = min(num_tokens, self.reader.num_tokens)
        self._next_step = -1
        self._batches: Iterator[ActivationBatch] = iter(())

    @torch.no_grad()
    def __call__(self, step: int) -> ReplayBatch:
        """The batch of a PPO step, encoded."""
        epoch, place = divmod(step, self.reader.batches_per_epoch(self.num_tokens))
        if step != self._next_step or place == 0:
            self._batches = self.reader.shuffled(
                self.num_tokens,
                seed=self.seed,
                epoch=epoch,
                start_batch=place,
                columns=("resid", "final_hidden"),
            )
        self._next_step = step + 1
        batch = next(self._batches).to(self.sae.W_dec.device)
        assert batch.resid is not None
        assert batch.final_hidden is not None
        return ReplayBatch(self.sae.encode(batch.resid.float()), batch.final_hidden)
