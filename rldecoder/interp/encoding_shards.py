"""What an SAE makes of a split's cached residuals, computed in shards by any worker.

A shard is a run of the batches that one pass over the split would encode, so that its numbers are
those of that pass to the bit: a product of matrices may round otherwise for another number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from rldecoder import files
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.executors.jobs import Job, Measured, ShardFile, ShardWorker, make_job
from rldecoder.sae.model import Sae, SparseLatents

BATCHES = 64
"""Batches a shard."""


class EncodingSettings(BaseModel):
    """Which SAE, and which rows."""

    model_config = ConfigDict(frozen=True)

    sae: Path
    """Its folder."""
    cache: Path
    """Folder of the cached activations."""
    split: str
    max_tokens: int
    """Rows from the split's start, at most."""
    batch_tokens: int
    batches: int = BATCHES
    """Batches a shard."""

    @property
    def shard_tokens(self) -> int:
        """Rows a shard."""
        return self.batch_tokens * self.batches

    def plan(self) -> list[ShardFile]:
        """The shards; their size is in tokens."""
        total = min(self.max_tokens, ActivationReader(self.cache, self.split).num_tokens)
        firsts = range(0, total, self.shard_tokens)
        return [
            ShardFile(f"{self.split}-{n:05d}.safetensors", min(self.shard_tokens, total - first))
            for n, first in enumerate(firsts)
        ]


class EncodingWorker(ShardWorker[EncodingSettings, list[SparseLatents]]):
    """The SAE, which encodes a shard's batches."""

    settings_type = EncodingSettings

    def __init__(
        self, settings: EncodingSettings, device: torch.device, note: Callable[[str], None]
    ) -> None:
        super().__init__(settings, device, note)
        self._sae = Sae.load(settings.sae, device=device)
        self._reader = ActivationReader(settings.cache, settings.split)
        self._tokens = 0

    def measured(self) -> Measured:
        """Tokens encoded."""
        return {"tokens": self._tokens}

    @torch.no_grad()
    def compute(self, number: int, advance: Callable[[float], None]) -> list[SparseLatents]:
        """The latents of each batch, on the CPU."""
        settings = self.settings
        first = number * settings.shard_tokens
        end = min(first + settings.shard_tokens, settings.max_tokens)
        found = []
        for batch in self._reader.ordered(settings.batch_tokens, first=first, max_tokens=end):
            assert batch.resid is not None
            latents = self._sae.encode(batch.resid.to(self.device).float())
            found.append(SparseLatents(latents.acts.cpu(), latents.indices.cpu()))
            self._tokens += len(batch.pos)
            advance(len(batch.pos))
        return found

    def write(self, path: Path, result: list[SparseLatents]) -> str:
        """Activations and ids (in four bytes) of each batch; returns the file's SHA-256."""
        tensors = {}
        for number, latents in enumerate(result):
            tensors[f"acts.{number}"] = latents.acts.contiguous()
            tensors[f"indices.{number}"] = latents.indices.to(torch.int32).contiguous()
        with files.aside(path) as draft:
            save_file(tensors, draft)
            return files.hash_file(draft)


def encoding_job(settings: EncodingSettings, folder: Path, owner: str) -> Job:
    """The work in words; its files go into a folder, which is made.

    Args:
        owner: whose they are.
    """
    folder.mkdir(exist_ok=True)
    # No digest has the size of a batch: a run that goes on with another takes up no shard.
    return make_job(
        EncodingWorker, settings, settings.plan(), folder=folder,
        owner=f"{owner} {settings.batches} x {settings.batch_tokens} tokens",
        reads=[settings.sae, settings.cache],
    )  # fmt: skip


def read_encoded(paths: Sequence[Path]) -> Iterator[SparseLatents]:
    """The latents of every batch, shard by shard; one shard is in memory at a time."""
    for path in paths:
        tensors = load_file(path)
        for number in range(len(tensors) // 2):
            indices = tensors[f"indices.{number}"].to(torch.int64)
            yield SparseLatents(tensors[f"acts.{number}"], indices)
