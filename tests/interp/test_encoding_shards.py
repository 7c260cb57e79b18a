"""Latents encoded in shards are, bit for bit, those of one pass."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.executors.local import LocalExecutor
from rldecoder.executors.stage_shards import StageShards
from rldecoder.interp import encoding_shards
from rldecoder.interp.corpus import read_firings
from rldecoder.interp.encoding_shards import EncodingSettings, EncodingWorker
from rldecoder.reporting import SilentBar, SilentReporter
from rldecoder.sae.model import Sae, SaeSpec

if TYPE_CHECKING:
    from conftest import Planted


def test_a_pass_over_encoded_shards_is_the_pass_itself(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = Sae.random_init(SaeSpec(d_model=len(planted.predicates), num_latents=40, k=5), seed=0)
    sae.save(tmp_path / "sae")
    monkeypatch.setattr(encoding_shards, "BATCHES", 3)
    settings = EncodingSettings.of(
        tmp_path / "sae", planted.cache, "test", max_tokens=700, batch_tokens=97
    )
    here = StageShards(
        LocalExecutor(), tmp_path, "test/0123", torch.device("cpu"), SilentReporter()
    )
    assert [shard.size for shard in settings.shards()] == [291, 291, 118]
    job = here.job(EncodingWorker, settings, [], "encoded")
    with LocalExecutor().open(job, device=torch.device("cpu"), report=SilentReporter()) as crew:
        assert crew.run([2, 0, 1], SilentBar()) == {"tokens": 700}

    # Of another size they are nobody's.
    fewer = settings.model_copy(update={"batch_tokens": 96})
    for size, left in ((settings, []), (fewer, [0, 1, 2])):
        again_job = here.job(EncodingWorker, size, [], "encoded")
        assert again_job.unfinished(lambda note: None) == left

    seen: list[tuple[torch.Tensor, ...]] = []
    again: list[tuple[torch.Tensor, ...]] = []
    reader = ActivationReader(planted.cache, "test")
    alone = read_firings(
        reader, sae, split="test", max_tokens=700, batch_tokens=97,
        observe=lambda batch, found: seen.append((batch.pos, found.acts, found.indices)),
    )  # fmt: skip
    joined = read_firings(
        reader, sae, split="test", max_tokens=700, batch_tokens=97,
        observe=lambda batch, found: again.append((batch.pos, found.acts, found.indices)),
        encoded=chain.from_iterable(here.results(EncodingWorker, settings, [], "encoded", "")),
    )  # fmt: skip
    assert len(seen) == len(again) == 8
    for one, other in zip(seen, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for name in ("data", "indices", "indptr"):
        one, other = (getattr(found.firings.matrix, name) for found in (alone, joined))
        np.testing.assert_array_equal(one, other)
