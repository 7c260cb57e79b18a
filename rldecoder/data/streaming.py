"""Activations computed when they are read: training without a cache on disk.

Shards, windows and the order of rows are those of the cache that the same tokens would fill, so
training on either ends with the same weights. A later epoch computes everything again, unless all
of it fits one window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from rldecoder.data.activation_reader import ShuffledActivations
from rldecoder.data.activations import ActivationBatch, ActivationMeta, VectorColumn, concatenate
from rldecoder.data.forward import ActivationPass, Shard
from rldecoder.data.shards import SplitSequences
from rldecoder.reporting import Advance

Progress = Callable[[int], AbstractContextManager[Advance]]
"""Opened with the tokens that a window takes; gives what is called with those of each pass."""


@contextmanager
def _unseen(num_tokens: int) -> Iterator[Advance]:
    yield lambda done: None


class ShardSource(ABC):
    """Who runs the frozen model over a stream's shards."""

    ahead: ClassVar[bool] = False
    """Whether the next window can be computed while the trainer works on this one."""

    @abstractmethod
    def compute(self, shards: Sequence[Shard], advance: Advance) -> Iterator[ActivationBatch]:
        """The rows of each shard, in the order asked for."""

    def stop(self) -> None:  # noqa: B027  (what runs here runs in turn)
        """End what is being computed ahead."""


class ModelHere(ShardSource):
    """The model in this process.

    Args:
        forward: computes a shard; `with_final` is on where final hidden states are asked for.
        sequences: of the split, read a shard at a time.
    """

    def __init__(self, forward: ActivationPass, sequences: SplitSequences) -> None:
        self._forward, self._sequences = forward, sequences

    def compute(self, shards: Sequence[Shard], advance: Advance) -> Iterator[ActivationBatch]:
        """See `ShardSource.compute`."""
        for shard in shards:
            ids = self._sequences.read(shard.first_sequence, shard.num_sequences)
            yield self._forward.shard(torch.from_numpy(ids), shard.first_sequence, advance)


class StreamedActivations(ShuffledActivations):
    """A split's activations, straight from the frozen model.

    Args:
        meta: of the cache that is not there.
        plan: the split's shards, as in that cache.
        source: who computes them. One that works ahead holds a second window in memory.
        columns: what it computes; readers ask for the same.
        window_bytes: rows that are shuffled together occupy at most this much memory.
        progress: shown while a window is waited for, which can take minutes.
    """

    def __init__(
        self,
        meta: ActivationMeta,
        plan: Sequence[Shard],
        source: ShardSource,
        *,
        columns: Sequence[VectorColumn] = ("resid",),
        window_bytes: int,
        progress: Progress = _unseen,
    ) -> None:
        super().__init__(meta, window_bytes)
        self._plan, self._source, self._progress = plan, source, progress
        self._columns = tuple(columns)
        self.rows_found: dict[int, int] = {}
        """Rows of the shards computed so far. Kept with a checkpoint and put back, it spares a
        resumed run the shards that it only has to skip."""
        self.num_tokens = sum(self._full_rows())
        self._held: tuple[tuple[int, ...], dict[str, Tensor]] | None = None
        self._ahead: tuple[tuple[int, ...], Future[ActivationBatch]] | None = None
        self._background = ThreadPoolExecutor(1, "window-ahead")

    def close(self) -> None:
        """End what is being computed ahead."""
        self._source.stop()
        self._background.shutdown(wait=True)

    def _full_rows(self) -> list[int]:
        return [shard.max_rows(self.meta.context_length) for shard in self._plan]

    def _rows(self, shard: int) -> int:
        if shard not in self.rows_found:
            with self._progress(self._tokens((shard,))) as advance:
                self._compute_in_turn((shard,), advance)
        return self.rows_found[shard]

    def _tokens(self, shards: tuple[int, ...]) -> int:
        return sum(self._plan[n].num_sequences for n in shards) * self.meta.context_length

    def _load(self, shards: tuple[int, ...], columns: Sequence[VectorColumn]) -> dict[str, Tensor]:
        if tuple(columns) != self._columns:
            raise ValueError(f"a stream of {self._columns} was asked for {tuple(columns)}")
        if self._held is None or self._held[0] != shards:
            self._held = None  # freed before the next window is computed
            self._held = (shards, self._window(shards))
        return self._held[1]

    def _prepare(self, shards: tuple[int, ...], columns: Sequence[VectorColumn]) -> None:
        """Have the next window computed while this one is used, where that is elsewhere."""
        if self._source.ahead and self._ahead is None:
            ahead = self._background.submit(self._compute, shards, lambda done: None)
            self._ahead = (shards, ahead)

    def _window(self, shards: tuple[int, ...]) -> dict[str, Tensor]:
        ahead, self._ahead = self._ahead, None
        with self._progress(self._tokens(shards)) as advance:
            if ahead is not None and ahead[0] == shards:
                rows = ahead[1].result()
                advance(self._tokens(shards))
            else:
                rows = self._compute_in_turn(shards, advance)
        return {name: column for name, column in rows._asdict().items() if column is not None}

    def _compute_in_turn(self, shards: tuple[int, ...], advance: Advance) -> ActivationBatch:
        """After what was begun ahead: the source does one thing at a time."""
        if not self._source.ahead:
            return self._compute(shards, advance)
        return self._background.submit(self._compute, shards, advance).result()

    def _compute(self, shards: tuple[int, ...], advance: Advance) -> ActivationBatch:
        batches = list(self._source.compute([self._plan[n] for n in shards], advance))
        for number, batch in zip(shards, batches, strict=True):
            self.rows_found[number] = len(batch.pos)
        return concatenate(batches)
