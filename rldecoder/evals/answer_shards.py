"""Answers to tasks in shards that any worker computes: of the frozen model and published decoders.

A shard is one model's answers to a run of the batches that one pass over a task would ask. A batch
shares what it computes and is padded to its longest prompt, so none is cut in two.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rldecoder.decoder.loading import load_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.comparison import FROZEN
from rldecoder.evals.generation import GenerateFunction, newline_token_ids, prefix_generate
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.evals.tasks import TaskRow, rows_from_json, rows_to_json, run_task
from rldecoder.executors.jobs import ShardFile, ShardSettings, TensorWorker, as_tensor, as_text
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import Advance, Note
from rldecoder.sae.model import Sae

SHARD_PROMPTS = 32
"""Prompts a shard, or one batch of them."""


Opened = tuple[FrozenLM, Mapping[str, SaeDecoderForCausalLM]]
"""The frozen model, and decoders by name."""


class Asked(NamedTuple):
    """A shard: who answers which prompts."""

    system: str
    first: int
    end: int
    """Number of the prompt after the last one."""


class AnswerSettings(ShardSettings):
    """Which models, and what they are asked."""

    model: Path
    record: Path
    sae: Path
    decoders: dict[str, Path]
    """Their folders, by name; the frozen model answers before them."""
    prompts: tuple[TaskPrompt, ...]
    """Task by task. Whole, for the files that some are from are not everywhere."""
    batch_size: int

    def open(self, device: torch.device) -> Opened:
        """Load the models."""
        lm = FrozenLM.load(self.model, device=device, record=self.record)
        sae = Sae.load(self.sae, device=device)
        return lm, {name: load_decoder(folder, lm, sae) for name, folder in self.decoders.items()}

    def asked(self) -> list[Asked]:
        """The shards by number: all answers of a model, then those of the next one."""
        size = self.batch_size * max(1, SHARD_PROMPTS // self.batch_size)
        runs, begun = [], 0
        for _, prompts in groupby(self.prompts, key=lambda prompt: prompt.task):
            end = begun + len(list(prompts))
            runs += [(first, min(first + size, end)) for first in range(begun, end, size)]
            begun = end
        return [Asked(name, *run) for name in (FROZEN, *self.decoders) for run in runs]

    def shards(self) -> list[ShardFile]:
        """See `ShardSettings.shards`."""
        return [
            ShardFile(f"{one.system}-{one.first:07d}.safetensors", one.end - one.first)
            for one in self.asked()
        ]

    def batching(self) -> str:
        """See `ShardSettings.batching`."""
        return f"{self.batch_size} prompts"


class AnswerWorker(TensorWorker[AnswerSettings, list[TaskRow]]):
    """Frozen model and decoders.

    Args:
        opened: what the settings open, where this process has it already.
    """

    settings_type = AnswerSettings
    unit = "prompts"

    def __init__(
        self,
        settings: AnswerSettings,
        device: torch.device,
        note: Note,
        opened: Opened | None = None,
    ) -> None:
        super().__init__(settings, device, note)
        self._lm, decoders = opened or settings.open(device)
        self._generators: dict[str, GenerateFunction] = {FROZEN: prefix_generate(self._lm.model)}
        self._generators |= {name: prefix_generate(one) for name, one in decoders.items()}
        self._asked = settings.asked()

    def compute(self, number: int, advance: Advance) -> list[TaskRow]:
        """What a model answers, in the order of the prompts."""
        system, first, end = self._asked[number]
        result = run_task(
            self._generators[system],
            self.settings.prompts[first:end],
            self._lm.tokenizer,
            batch_size=self.settings.batch_size,
            device=self._lm.device,
            stop_ids=self._stops,
            end_ids=self._lm.end_token_ids,
        )
        advance(end - first)
        return result.rows

    @classmethod
    def pack(cls, result: list[TaskRow]) -> Mapping[str, Tensor]:
        """As the bytes of their JSON."""
        return {"rows": as_tensor(rows_to_json(result))}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> list[TaskRow]:
        """See `TensorWorker.unpack`."""
        return rows_from_json(as_text(tensors["rows"]))

    @cached_property
    def _stops(self) -> list[int]:
        return newline_token_ids(self._lm.tokenizer)
