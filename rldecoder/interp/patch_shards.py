"""Text to patch, and its exact effects and attributions in shards that any worker computes.

A shard is a run of the batches that one pass over a domain would run, or of the latents that one
pass would ablate, and keeps what each sequence or latent says. It is added up in their order,
whoever computed it, and so rounds as in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from rldecoder.config.interp import Domain, RankFeaturesConfig
from rldecoder.data.shards import SplitSequences
from rldecoder.decoder.loading import load_decoder
from rldecoder.evals.prompts import make_prompts
from rldecoder.executors.jobs import Runs, TensorWorker
from rldecoder.interp.importance import (
    PatchBatch,
    Subject,
    TargetName,
    attribute,
    considered_positions,
    make_batch,
)
from rldecoder.interp.tally import SequenceImportance, sequences_of
from rldecoder.interp.validation import Ablation
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import encode_prompts
from rldecoder.reporting import Advance, Note
from rldecoder.sae.model import Sae
from rldecoder.seeds import derive_seed

TASKS = ("addition", "cloze")
SHARD_TOKENS = 4096
"""Tokens of text that a shard attributes, or one batch of them."""
PROMPTS = 64
"""Prompts of a task that a shard attributes."""


class PatchText:
    """Makes the patch batches of a domain.

    Args:
        corpus: folder of the packed tokens.
        seed: the stage's.
        skip_first: positions at the start whose residual the SAE does not read.
    """

    def __init__(
        self, corpus: Path, config: RankFeaturesConfig, seed: int, subject: Subject, skip_first: int
    ) -> None:
        self.corpus, self.config, self.seed = corpus, config, seed
        self.subject, self.skip_first = subject, skip_first
        self._texts: dict[Domain, SplitSequences] = {}
        self._tokenised: dict[Domain, list[np.ndarray[Any, Any]]] = {}

    def num_sequences(self, domain: Domain) -> int:
        """How many sequences `batches` yields in all."""
        if domain in TASKS:
            return len(self._prompts(domain))
        text = self._text(domain)
        return min(text.num_sequences, math.ceil(self.config.budget_tokens / text.length))

    def shard_sequences(self, domain: Domain) -> int:
        """Sequences of a shard: whole batches."""
        if domain in TASKS:
            return PROMPTS
        size = self.config.batch_sequences
        return size * max(1, SHARD_TOKENS // (size * self._text(domain).length))

    def batches(
        self,
        domain: Domain,
        max_tokens: int | None = None,
        first: int = 0,
        end: int | None = None,
    ) -> Iterator[PatchBatch]:
        """Patch batches of a domain, from its sequence number `first` on to the one before `end`.

        `max_tokens` stops early, after at least one sequence.
        """
        task = domain in TASKS
        stop = self.num_sequences(domain) if end is None else min(end, self.num_sequences(domain))
        if max_tokens is not None:
            stop = min(stop, max(1, self._count_within(domain, max_tokens)))
        # Prompts differ in length and are run one by one, which spares padding.
        size = 1 if task else self.config.batch_sequences
        for start in range(first, stop, size):
            rows = self._rows(domain, start, min(size, stop - start))
            ids = torch.as_tensor(rows, dtype=torch.long, device=self.subject.lm.device)
            yield make_batch(
                self.subject,
                ids,
                self._metric_mask(ids, task),
                metric_token="frozen_argmax" if task else self.config.metric_token,
                skip_first=self.skip_first,
            )

    def ablation(self, target: TargetName) -> Ablation:
        """Exact ablation on the text that estimates are validated on."""
        return Ablation(self.subject.metric(target), self._validated)

    @cached_property
    def _validated(self) -> list[PatchBatch]:
        """Kept in memory: each is run once for every latent that is ablated."""
        return list(self.batches(self.config.validation_domain, self.config.validation_tokens))

    def attributions(
        self, target: TargetName, batch: PatchBatch, integrated_steps: int | None
    ) -> list[SequenceImportance]:
        """What each sequence of a batch says; see `attribute` for the steps."""
        found = attribute(self.subject.metric(target), batch, integrated_steps)
        considered = considered_positions(
            batch, looks_back=self.subject.looks_back(target), skip_first=self.skip_first
        )
        return sequences_of(batch, found, considered)

    def _metric_mask(self, ids: Tensor, task: bool) -> Tensor:
        mask = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        if task:
            mask[:, -1] = True
        else:
            # Ends at the last position but one: the last has no next token.
            mask[:, self.skip_first : -1 : self.config.metric_stride] = True
        return mask

    def _rows(self, domain: Domain, first: int, count: int) -> np.ndarray[Any, Any]:
        """Token ids [count, T] of sequences that exist; of prompts one at a time."""
        if domain not in TASKS:
            return self._text(domain).read(first, count)
        return np.stack(self._prompts(domain)[first : first + count])

    def _count_within(self, domain: Domain, max_tokens: int) -> int:
        """How many sequences fit into so many tokens."""
        if domain not in TASKS:
            return max_tokens // self._text(domain).length
        ends = np.cumsum([len(prompt) for prompt in self._prompts(domain)])
        return int(np.searchsorted(ends, max_tokens, "right"))

    def _text(self, domain: Domain) -> SplitSequences:
        """Read a few sequences at a time, so that neither time nor memory of a shard hangs on how
        much text there is."""
        if domain not in self._texts:
            self._texts[domain] = SplitSequences(self.corpus, domain)
        return self._texts[domain]

    def _prompts(self, domain: Domain) -> list[np.ndarray[Any, Any]]:
        if domain not in self._tokenised:
            # Of the training split: evaluation keeps the test split to itself.
            prompts = make_prompts(
                "addition" if domain == "addition" else "cloze",
                "train",
                self.config.num_prompts,
                derive_seed(self.seed, "prompts", domain),
            )
            lm = self.subject.lm
            texts = [prompt.prompt for prompt in prompts]
            rows = encode_prompts(lm.tokenizer, texts, lm.context_length)
            self._tokenised[domain] = [np.array(row) for row in rows]
        return self._tokenised[domain]


class PatchSettings(Runs):
    """Which models, on which text."""

    model: Path
    record: Path
    sae: Path
    decoder: Path
    corpus: Path
    config: RankFeaturesConfig
    seed: int
    skip_first: int

    def batching(self) -> str:
        """See `ShardSettings.batching`."""
        return f"{self.config.batch_sequences} sequences"


Settings = TypeVar("Settings", bound=PatchSettings)
Result = TypeVar("Result")


class _PatchWorker(TensorWorker[Settings, Result]):
    """The models, in float32."""

    def __init__(self, settings: Settings, device: torch.device, note: Note) -> None:
        super().__init__(settings, device, note)
        lm = FrozenLM.load(
            settings.model, device=device, dtype=torch.float32, record=settings.record
        )
        sae = Sae.load(settings.sae, device=device)
        decoder = load_decoder(settings.decoder, lm, sae).requires_grad_(False)
        self.text = PatchText(
            settings.corpus, settings.config, settings.seed, Subject(lm, sae, decoder),
            settings.skip_first,
        )  # fmt: skip


class ExactSettings(PatchSettings):
    """Which latents are ablated, for whose prediction."""

    target: TargetName
    latents: tuple[int, ...]


class ExactWorker(_PatchWorker[ExactSettings, list[float]]):
    """Ablates latents one by one."""

    settings_type = ExactSettings
    unit = "latent"

    def compute(self, number: int, advance: Advance) -> list[float]:
        """The effects of a shard's latents, in nats."""
        found = []
        for latent in self.settings.latents[slice(*self.settings.bounds(number))]:
            found.append(self._ablation.effect(latent))
            advance(1)
        return found

    @classmethod
    def pack(cls, result: list[float]) -> Mapping[str, Tensor]:
        """In double precision."""
        return {"effects": torch.tensor(result, dtype=torch.float64)}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> list[float]:
        """See `TensorWorker.unpack`."""
        effects: list[float] = tensors["effects"].tolist()
        return effects

    @cached_property
    def _ablation(self) -> Ablation:
        return self.text.ablation(self.settings.target)


class AttributionSettings(PatchSettings):
    """Which domain, and how it is attributed."""

    domain: Domain
    steps: dict[TargetName, int | None]
    """Of integrated gradients, for each target; None patches."""


Attributed = dict[TargetName, list[SequenceImportance]]
"""The sequences of a shard, by target."""


class AttributionWorker(_PatchWorker[AttributionSettings, Attributed]):
    """Attributes predictions to latents."""

    settings_type = AttributionSettings
    unit = "seq"

    def compute(self, number: int, advance: Advance) -> Attributed:
        """The sequences of a shard, target by target."""
        settings = self.settings
        first, end = settings.bounds(number)
        by_target: Attributed = {name: [] for name in settings.steps}
        for batch in self.text.batches(settings.domain, first=first, end=end):
            for target, steps in settings.steps.items():
                by_target[target] += self.text.attributions(target, batch, steps)
            advance(batch.metric_mask.shape[0])

        return by_target

    @classmethod
    def pack(cls, result: Attributed) -> Mapping[str, Tensor]:
        """Columns over the positions of all sequences, and how many each sequence has."""
        columns = {}
        for target, found in result.items():
            columns[f"{target}.positions"] = torch.tensor([len(one.error) for one in found])
            for name in SequenceImportance._fields:
                columns[f"{target}.{name}"] = torch.cat([getattr(one, name) for one in found])
        return columns

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Attributed:
        """See `TensorWorker.unpack`."""
        found: Attributed = {}
        for target in get_args(TargetName):
            if f"{target}.positions" not in tensors:
                continue
            counts = tensors[f"{target}.positions"].tolist()
            parts = [
                tensors[f"{target}.{name}"].split(counts) for name in SequenceImportance._fields
            ]
            found[target] = [SequenceImportance(*one) for one in zip(*parts, strict=True)]
        return found
