"""Activations computed when they are read: training without a cache on disk.

Shards, windows and the order of rows are those of the cache that the same tokens would fill, so
training on either ends with the same weights. A later epoch computes everything again, unless all
of it fits one window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from rldecoder.data.activation_reader import ShuffledActivations
from rldecoder.data.activations import ActivationBatch, ActivationMeta, VectorColumn, concatenate
from rldecoder.data.forward import ActivationPass, plan_shards

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Opened with the tokens that a window takes; gives what is called with those of each pass."""


@contextmanager
def _unseen(num_tokens: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


class StreamedActivations(ShuffledActivations):
    """A split's residuals, straight from the frozen model.

    Args:
        meta: of the cache that is not there.
        input_ids: [S, T] int64, the split's sequences.
        forward: computes a shard; `with_final` may be off.
        shard_tokens: tokens a shard.
        window_bytes: rows that are shuffled together occupy at most this much memory.
        progress: shown while a window is computed, which can take minutes.
    """

    def __init__(
        self,
        meta: ActivationMeta,
        input_ids: Tensor,
        forward: ActivationPass,
        *,
        shard_tokens: int,
        window_bytes: int,
        progress: Progress = _unseen,
    ) -> None:
        super().__init__(meta, window_bytes)
        self._input_ids, self._forward, self._progress = input_ids, forward, progress
        self._plan = plan_shards({"train": len(input_ids)}, meta.context_length, shard_tokens)
        self.rows_found: dict[int, int] = {}
        """Rows of the shards computed so far. Kept with a checkpoint and put back, it spares a
        resumed run the shards that it only has to skip."""
        self.num_tokens = sum(self._full_rows())
        self._held: tuple[tuple[int, ...], dict[str, Tensor]] | None = None

    def _full_rows(self) -> list[int]:
        return [shard.max_rows(self.meta.context_length) for shard in self._plan]

    def _rows(self, shard: int) -> int:
        if shard not in self.rows_found:
            with self._progress(self._tokens(shard)) as advance:
                self._compute(shard, advance)
        return self.rows_found[shard]

    def _tokens(self, shard: int) -> int:
        return self._plan[shard].num_sequences * self.meta.context_length

    def _load(self, shards: tuple[int, ...], columns: Sequence[VectorColumn]) -> dict[str, Tensor]:
        if tuple(columns) != ("resid",):
            raise ValueError("a stream holds residuals only")
        if self._held is None or self._held[0] != shards:
            self._held = None  # freed before the next window is computed
            self._held = (shards, self._window(shards))
        return self._held[1]

    def _window(self, shards: tuple[int, ...]) -> dict[str, Tensor]:
        with self._progress(sum(self._tokens(shard) for shard in shards)) as advance:
            rows = concatenate([self._compute(shard, advance) for shard in shards])
        assert rows.resid is not None
        ids = {"seq_id": rows.seq_id, "pos": rows.pos, "token_id": rows.token_id}
        return ids | {"resid": rows.resid}

    def _compute(self, number: int, advance: Callable[[int], None]) -> ActivationBatch:
        shard = self._plan[number]
        rows = slice(shard.first_sequence, shard.first_sequence + shard.num_sequences)
        batch = self._forward.shard(self._input_ids[rows], shard.first_sequence, advance)
        self.rows_found[number] = len(batch.pos)
        return batch
