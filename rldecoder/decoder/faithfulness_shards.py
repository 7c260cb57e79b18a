"""Faithfulness of what is published, scored in shards that any worker computes.

A shard is one batch of those that a pass over a split would score, and keeps the scores of each
token: means and intervals are taken over all of them, as in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from rldecoder.config.decoder import MatmulPrecision
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.distill import NextTokens
from rldecoder.decoder.faithfulness import (
    BATCH_ROWS,
    Predictor,
    TokenScores,
    decoder_predictor,
    score_batch,
)
from rldecoder.decoder.gate import lens_predictors
from rldecoder.decoder.loading import AffineLens, load_decoder
from rldecoder.decoder.sequences import whole_sequences
from rldecoder.executors.jobs import Runs, TensorWorker
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import Advance, Note
from rldecoder.sae.model import Sae

_SCORES = "scores."

Opened = tuple[FrozenLM, Mapping[str, Predictor]]
"""The frozen model, and what is scored, by name."""


class FaithfulnessSettings(Runs):
    """Which decoders, on which rows (see `batch_ends`); shards are named after the split."""

    model: Path
    record: Path
    sae: Path
    decoders: dict[str, Path]
    """Their folders, by name."""
    lens: Path | None = None
    """An affine lens to score beside them, alone and as the decoder that it starts."""
    cache: Path
    """Folder of the cached activations."""
    precision: MatmulPrecision

    def open(self, device: torch.device) -> Opened:
        """Load the models."""
        lm = FrozenLM.load(self.model, device=device, record=self.record)
        sae = Sae.load(self.sae, device=device)
        found = {
            name: decoder_predictor(load_decoder(folder, lm, sae))
            for name, folder in self.decoders.items()
        }
        if self.lens is not None:
            found |= lens_predictors(lm, sae, AffineLens.load(self.lens, device))
        return lm, found


class FaithfulnessWorker(TensorWorker[FaithfulnessSettings, TokenScores]):
    """Decoders, and a lens, beside the frozen model.

    Args:
        opened: what the settings open, where this process has it already.
    """

    settings_type = FaithfulnessSettings

    def __init__(
        self,
        settings: FaithfulnessSettings,
        device: torch.device,
        note: Note,
        opened: Opened | None = None,
    ) -> None:
        super().__init__(settings, device, note)
        self._lm, self._predictors = opened or settings.open(device)
        self._reader = ActivationReader(settings.cache, settings.name)

    def compute(self, number: int, advance: Advance) -> TokenScores:
        """The scores of a shard's tokens."""
        first, end = self.settings.bounds(number)
        (batch,) = self._reader.ordered(
            end - first, columns=("resid", "final_hidden"), max_tokens=end, first=first
        )
        next_tokens = NextTokens(self._reader, first, end)
        found = score_batch(self._predictors, batch, next_tokens, self._lm, self.settings.precision)
        advance(end - first)
        return found

    @classmethod
    def pack(cls, result: TokenScores) -> Mapping[str, Tensor]:
        """The scores by predictor, and what they are of."""
        tensors = {f"{_SCORES}{name}": found for name, found in result.by_predictor.items()}
        return tensors | {"has_label": result.has_label, "sequence": result.sequence}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> TokenScores:
        """See `TensorWorker.unpack`; predictors by name."""
        scores = {
            name.removeprefix(_SCORES): tensors[name]
            for name in sorted(tensors)
            if name.startswith(_SCORES)
        }
        return TokenScores(scores, tensors["has_label"], tensors["sequence"])


def batch_ends(reader: ActivationReader, max_tokens: int | None) -> tuple[int, ...]:
    """Where the batches of `evaluate_predictors` end: numbers of the rows after their last ones."""
    batches = whole_sequences(reader, BATCH_ROWS, columns=(), max_tokens=max_tokens)
    return tuple(accumulate(len(batch.pos) for batch in batches))
