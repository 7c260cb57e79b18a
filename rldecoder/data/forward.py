"""Tokens through the frozen model, shard by shard: what is cached, or streamed into training.

A shard's rows depend on its sequences and the size of the micro-batches only, so that a cache, a
resumed cache and a stream hold the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from rldecoder.data.activations import ActivationBatch, concatenate
from rldecoder.data.shards import SplitSequences
from rldecoder.errors import NoResourceError
from rldecoder.executors.jobs import ShardFile, ShardSettings, ShardWorker
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.sinks import SKIP_FIRST, is_sink
from rldecoder.reporting import Advance, Note


@dataclass(frozen=True)
class Shard:
    """A run of sequences that becomes one file."""

    split: str
    index: int
    first_sequence: int
    num_sequences: int

    def max_rows(self, context_length: int) -> int:
        """Rows of the file, if no token is left out for its norm."""
        return self.num_sequences * (context_length - SKIP_FIRST)


def plan_shards(
    num_sequences: Mapping[str, int], context_length: int, shard_tokens: int
) -> list[Shard]:
    """Shards of about `shard_tokens`, whole sequences each, split by split."""
    per_shard = max(1, shard_tokens // context_length)
    return [
        Shard(split, index, first, min(per_shard, count - first))
        for split, count in num_sequences.items()
        for index, first in enumerate(range(0, count, per_shard))
    ]


class PassSettings(ShardSettings):
    """Which model over which text, up to which layer."""

    model: Path
    record: Path
    corpus: Path
    hook_layer: int
    micro_batch: int
    """Sequences a pass."""
    plan: tuple[Shard, ...]
    suffix: str = ".parquet"
    """Of the files."""

    def shards(self) -> list[ShardFile]:
        """See `ShardSettings.shards`; their size is in tokens."""
        length = SplitSequences(self.corpus, self.plan[0].split).length
        return [
            ShardFile(f"{s.split}-{s.index:05d}{self.suffix}", s.num_sequences * length)
            for s in self.plan
        ]


class ActivationPass:
    """Forward passes in micro-batches that shrink when memory runs out.

    Args:
        hook_layer: the residual stream after this many blocks is kept.
        say: receives a line when memory ran out.
        with_final: whether the final hidden state is computed too; else the blocks above the hook
            layer are not run.
    """

    def __init__(
        self,
        lm: FrozenLM,
        hook_layer: int,
        micro_batch: int,
        say: Note,
        *,
        with_final: bool = True,
    ) -> None:
        self._lm, self._hook_layer, self._say = lm, hook_layer, say
        self._with_final = with_final
        self.micro_batch = micro_batch
        self.num_tokens, self.seconds = 0, 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Of the forward passes of this process, first one (warm-up) included; None if none."""
        return self.num_tokens / self.seconds if self.seconds else None

    def shard(
        self, input_ids: Tensor, first_sequence: int, advance: Callable[[int], None]
    ) -> ActivationBatch:
        """Activations of a shard's sequences [B, T] int64, on the CPU in bfloat16, without sinks.

        Args:
            first_sequence: seq_id of the first one.
            advance: called with the number of tokens of each pass.
        """
        parts = []
        for part, num_tokens in self._batches(input_ids, first_sequence):
            parts.append(part)
            advance(num_tokens)
        whole = concatenate(parts)
        assert whole.resid is not None
        return whole.select(~is_sink(whole.resid, whole.token_id, self._lm.front))

    def _batches(
        self, input_ids: Tensor, first_sequence: int
    ) -> Iterator[tuple[ActivationBatch, int]]:
        start = 0
        while start < len(input_ids):
            ids = input_ids[start : start + self.micro_batch]
            batch = self._try(ids, first_sequence + start)
            if batch is None:
                self.micro_batch //= 2
                if self._lm.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._say(f"Memory ran out; going on with {self.micro_batch} sequences a pass.")
                continue
            yield batch, ids.numel()
            start += len(ids)

    def _try(self, ids: Tensor, first_sequence: int) -> ActivationBatch | None:
        """One pass over sequences [B, T]; None when memory ran out and B can shrink."""
        begun = time.perf_counter()
        try:
            here = ids.to(self._lm.device)
            if self._with_final:
                resid, final = self._lm.resid_and_final(here, self._hook_layer)
            else:
                resid, final = self._lm.trunk(here, self._hook_layer).resid, None
            batch = _rows(ids, resid, final, first_sequence)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.micro_batch > 1:
                return None
            raise NoResourceError(
                "Memory ran out on a single sequence.",
                f"{type(error).__name__}: {error}",
                "Lower `ingest.context_length`, or use a device with more memory.",
            ) from error
        self.seconds += time.perf_counter() - begun
        self.num_tokens += ids.numel()
        return batch


class PassWorker(ShardWorker[PassSettings, ActivationBatch]):
    """The frozen model, which turns a shard's sequences into activations."""

    settings_type = PassSettings
    with_final: ClassVar[bool] = True
    """See `ActivationPass`."""

    def __init__(self, settings: PassSettings, device: torch.device, note: Note) -> None:
        super().__init__(settings, device, note)
        self.lm = FrozenLM.load(settings.model, device=device, record=settings.record)
        self.forward = ActivationPass(
            self.lm, settings.hook_layer, settings.micro_batch, note, with_final=self.with_final
        )
        self._text_of = cache(partial(SplitSequences, settings.corpus))

    def compute(self, number: int, advance: Advance) -> ActivationBatch:
        """The rows of a shard, from its sequences and the size of the micro-batches alone."""
        shard = self.settings.plan[number]
        ids = self._text_of(shard.split).read(shard.first_sequence, shard.num_sequences)
        return self.forward.shard(torch.from_numpy(ids), shard.first_sequence, advance)


def _rows(ids: Tensor, resid: Tensor, final: Tensor | None, first_sequence: int) -> ActivationBatch:
    """Flatten [B, T, D] to rows without the skipped positions."""
    num_sequences, length = ids.shape
    kept = length - SKIP_FIRST
    sequences = torch.arange(first_sequence, first_sequence + num_sequences)
    return ActivationBatch(
        sequences.repeat_interleave(kept),
        torch.arange(SKIP_FIRST, length).repeat(num_sequences),
        ids[:, SKIP_FIRST:].reshape(-1),
        _flat(resid),
        None if final is None else _flat(final),
    )


def _flat(vectors: Tensor) -> Tensor:
    return vectors[:, SKIP_FIRST:].reshape(-1, vectors.shape[-1]).to("cpu", torch.bfloat16)


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises a plain RuntimeError when the CPU's allocator fails.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "not enough memory" in str(error) or "can't allocate memory" in str(error)
    )
