"""Shards of whole sequences, and forward passes whose rows depend on nothing else."""

from __future__ import annotations

import pytest
import torch

from rldecoder.data.forward import ActivationPass, plan_shards
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.sinks import SKIP_FIRST

LENGTH = 8


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 500, (5, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shard_tokens", [1, 8, 17, 1000])
def test_shards_hold_every_sequence_once(shard_tokens: int) -> None:
    counts = {"train": 5, "test": 1, "empty": 0}
    shards = plan_shards(counts, LENGTH, shard_tokens)
    for split, count in counts.items():
        mine = [shard for shard in shards if shard.split == split]
        held = [
            n for s in mine for n in range(s.first_sequence, s.first_sequence + s.num_sequences)
        ]
        assert held == list(range(count))
        assert [shard.index for shard in mine] == list(range(len(mine)))
    most = max(1, shard_tokens // LENGTH) * (LENGTH - SKIP_FIRST)
    assert max(shard.max_rows(LENGTH) for shard in shards) <= most


def test_rows_are_named_by_sequence_and_position(lm: FrozenLM, ids: torch.Tensor) -> None:
    advanced: list[int] = []
    batch = ActivationPass(lm, 2, 2, print).shard(ids, 30, advanced.append)
    assert sum(advanced) == ids.numel()
    assert torch.equal(ids[batch.seq_id.long() - 30, batch.pos.long()], batch.token_id.long())
    assert int(batch.pos.min()) == SKIP_FIRST
    assert batch.resid is not None
    assert batch.final_hidden is not None
    assert batch.resid.dtype == torch.bfloat16


def test_the_blocks_above_run_only_for_those_who_want_them(lm: FrozenLM, ids: torch.Tensor) -> None:
    whole = ActivationPass(lm, 2, 2, print).shard(ids, 0, lambda tokens: None)
    half = ActivationPass(lm, 2, 2, print, with_final=False).shard(ids, 0, lambda tokens: None)
    assert half.final_hidden is None
    assert half.resid is not None
    assert whole.resid is not None
    assert torch.equal(half.resid, whole.resid)
