"""Faithfulness of published decoders, scored in shards by the workers of a cluster.

A shard is one batch of those that a pass over a split would score, and keeps the scores of each
token: means and intervals are taken over all of them, as in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rldecoder import files
from rldecoder.config.decoder import MatmulPrecision
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.distill import NextTokens
from rldecoder.decoder.faithfulness import (
    BATCH_ROWS,
    TokenScores,
    decoder_predictor,
    score_batch,
)
from rldecoder.decoder.loading import load_decoder
from rldecoder.decoder.sequences import whole_sequences
from rldecoder.executors.jobs import Job, ShardFile, ShardWorker, make_job
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae

_SCORES = "scores."


class FaithfulnessSettings(BaseModel):
    """Which decoders, on which rows."""

    model_config = ConfigDict(frozen=True)

    model: Path
    record: Path
    sae: Path
    decoders: dict[str, Path]
    """Their folders, by name."""
    cache: Path
    """Folder of the cached activations."""
    split: str
    precision: MatmulPrecision
    ends: tuple[int, ...]
    """Number of the row after each shard's last one; see `batch_ends`."""

    def bounds(self, number: int) -> tuple[int, int]:
        """A shard's first row, and the one after its last."""
        return self.ends[number - 1] if number else 0, self.ends[number]

    def job(self, folder: Path, owner: str, reads: Sequence[Path]) -> Job:
        """The work in words; its files go into a folder, which is made.

        Args:
            owner: whose they are.
            reads: folders of artifacts that hold what is named here.
        """
        folder.mkdir(exist_ok=True)
        shards = []
        for number in range(len(self.ends)):
            first, end = self.bounds(number)
            shards.append(ShardFile(f"{self.split}-{number:05d}.safetensors", end - first))
        return make_job(FaithfulnessWorker, self, shards, folder=folder, owner=owner, reads=reads)


class FaithfulnessWorker(ShardWorker[FaithfulnessSettings, TokenScores]):
    """Decoders beside the frozen model."""

    settings_type = FaithfulnessSettings

    def __init__(
        self, settings: FaithfulnessSettings, device: torch.device, note: Callable[[str], None]
    ) -> None:
        super().__init__(settings, device, note)
        self._lm = FrozenLM.load(settings.model, device=device, record=settings.record)
        sae = Sae.load(settings.sae, device=device)
        self._predictors = {
            name: decoder_predictor(load_decoder(folder, self._lm, sae))
            for name, folder in settings.decoders.items()
        }
        self._reader = ActivationReader(settings.cache, settings.split)
        self._next_tokens = NextTokens(self._reader)

    def compute(self, number: int, advance: Callable[[float], None]) -> TokenScores:
        """The scores of a shard's tokens."""
        first, end = self.settings.bounds(number)
        (batch,) = self._reader.ordered(
            end - first, columns=("resid", "final_hidden"), max_tokens=end, first=first
        )
        found = score_batch(
            self._predictors, batch, self._next_tokens, self._lm, self.settings.precision
        )
        advance(end - first)
        return found

    def write(self, path: Path, result: TokenScores) -> str:
        """The scores by decoder, and what they are of; returns the file's SHA-256."""
        tensors = {f"{_SCORES}{name}": found for name, found in result.by_predictor.items()}
        tensors |= {"has_label": result.has_label, "sequence": result.sequence}
        with files.aside(path) as draft:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
            return files.hash_file(draft)


def batch_ends(reader: ActivationReader, max_tokens: int | None) -> tuple[int, ...]:
    """Where the batches of `evaluate_predictors` end: numbers of the rows after their last ones."""
    batches = whole_sequences(reader, BATCH_ROWS, columns=(), max_tokens=max_tokens)
    return tuple(accumulate(len(batch.pos) for batch in batches))


def read_scores(path: Path, names: Sequence[str]) -> TokenScores:
    """What a shard holds, decoder by decoder."""
    tensors: dict[str, Tensor] = load_file(path)
    scores = {name: tensors[f"{_SCORES}{name}"] for name in names}
    return TokenScores(scores, tensors["has_label"], tensors["sequence"])
