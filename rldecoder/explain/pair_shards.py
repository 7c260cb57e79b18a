"""Training pairs of Method B in shards that any worker computes.

A shard is a run of whole texts. Its removals are drawn by themselves, and its effects are those of
its own texts, so that it holds the same whoever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.shards import read_tokens
from rldecoder.decoder.loading import load_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.prompts import TASKS, make_prompts
from rldecoder.executors.jobs import Runs, TensorWorker
from rldecoder.explain.held_out_texts import MAX_TASK_TEXTS
from rldecoder.explain.pairs import PairParts, PairSettings, make_pairs
from rldecoder.explain.patching import Candidates, Measured
from rldecoder.explain.positions import (
    Positions,
    join_positions,
    positions_from_cache,
    positions_from_prompts,
)
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import Advance, Note
from rldecoder.sae.model import Sae

PLACES = 256
"""Positions a shard, at least; the last text's are all in it."""
TASK_SHARE = {"train": 0.02, "test": 0.1}
"""Of the positions that end a task prompt: each costs a run of its own, a text gives dozens."""
PER_TEXT = {"train": 64, "test": 4}
"""Positions of one sequence, on average: training saves passes, a test wants many documents."""


class Drawing(NamedTuple):
    """Positions of cached text and at the end of task prompts, and the seed that draws them."""

    split: Literal["train", "test"]
    """Of the prompts; text for training is that of the split `label`."""
    num_positions: int
    seed: int

    def draw(self, decoder: SaeDecoderForCausalLM, cache: Path, corpus: Path) -> Positions:
        """The positions; the folders hold cached activations and packed tokens."""
        text_split = "label" if self.split == "train" else "test"
        num_prompts = math.ceil(self.num_positions * TASK_SHARE[self.split] / len(TASKS))
        if self.split == "test":
            num_prompts = min(num_prompts, MAX_TASK_TEXTS)

        parts: list[Positions] = []
        if self.num_positions > num_prompts * len(TASKS):
            parts.append(
                positions_from_cache(
                    ActivationReader(cache, text_split),
                    decoder,
                    self.num_positions - num_prompts * len(TASKS),
                    self.seed,
                    per_text=PER_TEXT[self.split],
                    tokens=read_tokens(corpus, text_split),
                )
            )
        for task in TASKS:
            prompts = make_prompts(task, self.split, num_prompts, self.seed)
            parts.append(positions_from_prompts(decoder, [one.prompt for one in prompts], task))
        return join_positions(parts)


class PairShardSettings(Runs):
    """Which models, at which positions, and how pairs are made of them."""

    model: Path
    record: Path
    sae: Path
    decoder: Path
    cache: Path
    corpus: Path
    drawing: Drawing
    how: PairSettings
    excluded: tuple[int, ...]
    """Latents that are in no pair."""

    def open(self, device: torch.device) -> tuple[SaeDecoderForCausalLM, Positions]:
        """Load the models, and draw the positions."""
        lm = FrozenLM.load(self.model, device=device, dtype=torch.float32, record=self.record)
        decoder = load_decoder(self.decoder, lm, Sae.load(self.sae, device=device))
        return decoder, self.drawing.draw(decoder, self.cache, self.corpus)


class PairWorker(TensorWorker[PairShardSettings, PairParts]):
    """Ablates the features of predictions.

    Args:
        opened: what the settings open, where this process has it already.
    """

    settings_type = PairShardSettings
    unit = "positions"

    def __init__(
        self,
        settings: PairShardSettings,
        device: torch.device,
        note: Note,
        opened: tuple[SaeDecoderForCausalLM, Positions] | None = None,
    ) -> None:
        super().__init__(settings, device, note)
        self._decoder, self._positions = opened or settings.open(device)
        num_latents = self._decoder.frozen.sae.num_latents
        self._excluded = torch.zeros(num_latents, dtype=torch.bool, device=device)
        self._excluded[torch.tensor(settings.excluded, dtype=torch.long, device=device)] = True

    def compute(self, number: int, advance: Advance) -> PairParts:
        """The pairs of a shard's positions, on the CPU."""
        first, end = self.settings.bounds(number)
        found = make_pairs(
            self._decoder, self._positions.of(slice(first, end)), self.settings.how,
            excluded=self._excluded, number=number,
        )  # fmt: skip
        advance(end - first)
        return PairParts(
            Candidates(*map(Tensor.cpu, found.candidates)),
            Measured(*map(Tensor.cpu, found.measured)),
            found.removals.cpu(),
        )

    @classmethod
    def pack(cls, result: PairParts) -> Mapping[str, Tensor]:
        """Columns, named after their kind."""
        return {
            f"{type(part).__name__}.{name}": column
            for part in (result.candidates, result.measured)
            for name, column in part._asdict().items()
        } | {"removals": result.removals}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> PairParts:
        """See `TensorWorker.unpack`."""
        found, effects = (
            [tensors[f"{kind.__name__}.{name}"] for name in kind._fields]
            for kind in (Candidates, Measured)
        )
        return PairParts(Candidates(*found), Measured(*effects), tensors["removals"])
