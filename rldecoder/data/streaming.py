"""Activations computed when they are read: training without a cache on disk.

Shards, windows and the order of rows are those of the cache that the same tokens would fill, so
training on either ends with the same weights. A later epoch computes everything again, unless all
of it fits one window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from rldecoder.data.activation_reader import ShuffledActivations
from rldecoder.data.activations import ActivationBatch, ActivationMeta, VectorColumn, concatenate
from rldecoder.data.forward import ActivationPass, plan_shards


class StreamedActivations(ShuffledActivations):
    """A split's residuals, straight from the frozen model.

    Args:
        meta: of the cache that is not there.
        input_ids: [S, T] int64, the split's sequences.
        forward: computes a shard; `with_final` may be off.
        shard_tokens: tokens a shard.
        window_bytes: rows that are shuffled together occupy at most this much memory.
        advance: called with the number of tokens of each forward pass.
    """

    def __init__(
        self,
        meta: ActivationMeta,
        input_ids: Tensor,
        forward: ActivationPass,
        *,
        shard_tokens: int,
        window_bytes: int,
        advance: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        super().__init__(meta, window_bytes)
        self._input_ids, self._forward, self._advance = input_ids, forward, advance
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
            self._compute(shard)
        return self.rows_found[shard]

    def _load(self, shards: tuple[int, ...], columns: Sequence[VectorColumn]) -> dict[str, Tensor]:
        if tuple(columns) != ("resid",):
            raise ValueError("a stream holds residuals only")
        if self._held is None or self._held[0] != shards:
            self._held = None  # freed before the next window is computed
            self._held = (shards, self._window(shards))
        return self._held[1]

    def _window(self, shards: tuple[int, ...]) -> dict[str, Tensor]:
        rows = concatenate([self._compute(shard) for shard in shards])
        assert rows.resid is not None
        ids = {"seq_id": rows.seq_id, "pos": rows.pos, "token_id": rows.token_id}
        return ids | {"resid": rows.resid}

    def _compute(self, number: int) -> ActivationBatch:
        shard = self._plan[number]
        rows = slice(shard.first_sequence, shard.first_sequence + shard.num_sequences)
        batch = self._forward.shard(self._input_ids[rows], shard.first_sequence, self._advance)
        self.rows_found[number] = len(batch.pos)
        return batch
