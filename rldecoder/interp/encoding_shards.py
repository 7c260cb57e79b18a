"""What an SAE makes of a split's cached residuals, computed in shards by any worker.

A shard is a run of the batches that one pass over the split would encode, so that its numbers are
those of that pass to the bit: a product of matrices may round otherwise for another number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.executors.jobs import Measured, Runs, TensorWorker, even_ends
from rldecoder.reporting import Advance, Note
from rldecoder.sae.model import Sae, SparseLatents

BATCHES = 64
"""Batches a shard."""


class EncodingSettings(Runs):
    """Which SAE, and which rows; shards are named after the split."""

    sae: Path
    """Its folder."""
    cache: Path
    """Folder of the cached activations."""
    batch_tokens: int

    @classmethod
    def of(
        cls, sae: Path, cache: Path, split: str, *, max_tokens: int, batch_tokens: int
    ) -> EncodingSettings:
        """The rows from the split's start, at most so many of them."""
        total = min(max_tokens, ActivationReader(cache, split).num_tokens)
        ends = even_ends(total, batch_tokens * BATCHES)
        return cls(sae=sae, cache=cache, name=split, ends=ends, batch_tokens=batch_tokens)

    def batching(self) -> str:
        """See `ShardSettings.batching`."""
        return f"{BATCHES} x {self.batch_tokens} tokens"


class EncodingWorker(TensorWorker[EncodingSettings, list[SparseLatents]]):
    """The SAE, which encodes a shard's batches."""

    settings_type = EncodingSettings

    def __init__(self, settings: EncodingSettings, device: torch.device, note: Note) -> None:
        super().__init__(settings, device, note)
        self._sae = Sae.load(settings.sae, device=device)
        self._reader = ActivationReader(settings.cache, settings.name)
        self._tokens = 0

    def measured(self) -> Measured:
        """Tokens encoded."""
        return {"tokens": self._tokens}

    @torch.no_grad()
    def compute(self, number: int, advance: Advance) -> list[SparseLatents]:
        """The latents of each batch, on the CPU."""
        first, end = self.settings.bounds(number)
        size, found = self.settings.batch_tokens, []
        for batch in self._reader.ordered(size, first=first, max_tokens=end):
            assert batch.resid is not None
            latents = self._sae.encode(batch.resid.to(self.device).float())
            found.append(SparseLatents(latents.acts.cpu(), latents.indices.cpu()))
            self._tokens += len(batch.pos)
            advance(len(batch.pos))
        return found

    @classmethod
    def pack(cls, result: list[SparseLatents]) -> Mapping[str, Tensor]:
        """Activations and ids (in four bytes) of each batch."""
        tensors = {f"acts.{number}": latents.acts for number, latents in enumerate(result)}
        for number, latents in enumerate(result):
            tensors[f"indices.{number}"] = latents.indices.to(torch.int32)
        return tensors

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> list[SparseLatents]:
        """See `TensorWorker.unpack`."""
        return [
            SparseLatents(tensors[f"acts.{number}"], tensors[f"indices.{number}"].to(torch.int64))
            for number in range(len(tensors) // 2)
        ]
