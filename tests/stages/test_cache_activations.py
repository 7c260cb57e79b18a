"""The activation cache: values, budgets, resume after a kill, memory and disk that run out."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rldecoder.config.data import CacheActivationsConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch
from rldecoder.data.forward import ActivationPass, plan_shards
from rldecoder.data.shards import read_tokens
from rldecoder.errors import BadInputError, NoResourceError, NumericalError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import TextInputs
from rldecoder.stages.table import stage_named
from tests.stages.published import files_of
from tests.stages.token_inputs import token_inputs

STAGE = stage_named("cache_activations")

pytestmark = pytest.mark.usefixtures("no_proof")

MakeContext = Callable[..., StageContext]
LENGTH, HOOK_LAYER = 16, 2


@pytest.fixture(scope="module")
def inputs(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TextInputs:
    folder = tmp_path_factory.mktemp("ingest")
    return token_inputs(folder, tiny_lm_dir, LENGTH, {"train": 11, "test": 4})


def settings(**changes: object) -> CacheActivationsConfig:
    values = {"hook_layer": HOOK_LAYER, "shard_tokens": 3 * LENGTH, "micro_batch_sequences": 2}
    return CacheActivationsConfig.model_validate(values | changes)


def test_a_shard_is_written_while_the_next_one_is_computed(
    inputs: TextInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write waits for the second shard's forward pass: alone in turn, both would wait."""
    second = threading.Event()
    module = importlib.import_module("rldecoder.stages.cache_activations")
    write, compute = module.write_activation_shard, ActivationPass.shard
    computed = []

    def patient(path: Path, batch: ActivationBatch) -> None:
        assert second.wait(60), "the next shard was not begun while this one was being written"
        write(path, batch)

    def seen(self: ActivationPass, *args: Any) -> ActivationBatch:
        computed.append(args)
        if len(computed) == 2:
            second.set()
        return compute(self, *args)

    monkeypatch.setattr(module, "write_activation_shard", patient)
    monkeypatch.setattr(ActivationPass, "shard", seen)
    output = STAGE.run(inputs, settings(), context())
    assert output.metrics["tokens_train"] == 11 * (LENGTH - 1)


def test_rows_are_what_the_model_computes(
    inputs: TextInputs, context: MakeContext, tiny_lm_dir: Path
) -> None:
    ctx = context()
    output = STAGE.run(inputs, settings(), ctx)
    assert output.metrics["tokens_train"] == 11 * (LENGTH - 1)
    assert output.metrics["tokens_test"] == 4 * (LENGTH - 1)
    lm = FrozenLM.load(tiny_lm_dir)
    for split in ("train", "test"):
        reader = ActivationReader(ctx.out, split)
        assert (reader.meta.hook_layer, reader.meta.d_model) == (HOOK_LAYER, lm.d_model)
        rows = next(reader.ordered(10_000, columns=("resid", "final_hidden")))
        assert rows.resid is not None
        assert rows.final_hidden is not None
        kept = LENGTH - 1
        assert rows.pos.tolist() == list(range(1, LENGTH)) * (len(rows.pos) // kept)
        assert rows.seq_id.tolist() == [i // kept for i in range(len(rows.pos))]
        tokens = torch.from_numpy(read_tokens(inputs.corpus.folder, split))
        assert torch.equal(rows.token_id, tokens[:, 1:].flatten())
        resids, final = lm.residuals(tokens)
        for got, want in ((rows.resid, resids[HOOK_LAYER]), (rows.final_hidden, final)):
            want = want[:, 1:].reshape(-1, lm.d_model)
            assert torch.allclose(got.float(), want, rtol=2**-7, atol=1e-5)


def test_sinks_are_left_out_and_counted(
    inputs: TextInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FrozenLM.resid_and_final

    def with_sink(self: FrozenLM, ids: torch.Tensor, layer: int) -> Any:
        resid, final = original(self, ids, layer)
        resid[:, 1] *= torch.where(ids[:, 1, None] == token, 1000.0, 1.0)
        return resid, final

    tokens = torch.from_numpy(read_tokens(inputs.corpus.folder, "train"))
    token = int(tokens[5, 1])
    monkeypatch.setattr(FrozenLM, "resid_and_final", with_sink)
    ctx = context()
    output = STAGE.run(inputs, settings(), ctx)
    assert output.metrics["sink_tokens"] == 1
    reader = ActivationReader(ctx.out, "train")
    assert reader.num_tokens == output.metrics["tokens_train"] == 11 * (LENGTH - 1) - 1
    rows = next(reader.ordered(10_000))
    assert (5, 1) not in set(zip(rows.seq_id.tolist(), rows.pos.tolist(), strict=True))


def test_budgets_are_whole_sequences(inputs: TextInputs, context: MakeContext) -> None:
    ctx = context()
    budget = {"train": 5 * LENGTH + 3, "validation": 0, "label": 0, "test": 0, "ood": 0}
    STAGE.run(inputs, settings(budget_tokens=budget), ctx)
    assert ActivationReader(ctx.out, "train").meta.tokens == {"train": 5 * (LENGTH - 1)}


@pytest.mark.parametrize("killed_after", [1, 3])
def test_killed_run_goes_on_and_ends_the_same(
    inputs: TextInputs,
    context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
    killed_after: int,
) -> None:
    whole = context("whole")
    STAGE.run(inputs, settings(), whole)

    killed = context("killed")
    calls = count_calls(monkeypatch, stop_after=2 * killed_after)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(inputs, settings(), killed)
    monkeypatch.undo()
    kept = sorted(name for name in files_of(killed.progress) if name.endswith(".parquet"))
    assert len(kept) >= max(1, killed_after - 1)
    assert not any(name.endswith(".part") for name in files_of(killed.progress))
    (killed.progress / ".train-00009.parquet.1.part").write_bytes(b"half written")
    shard = killed.progress / kept.pop(0)
    shard.write_bytes(shard.read_bytes().replace(b"PAR1", b"PAR2", 1))

    calls = count_calls(monkeypatch)
    STAGE.run(inputs, settings(), killed)
    assert files_of(killed.out) == files_of(whole.out)
    planned = plan_shards({"train": 11, "test": 4}, LENGTH, 3 * LENGTH)
    again = [planned[0], *planned[1 + len(kept) :]]
    assert len(calls) == sum((s.num_sequences + 1) // 2 for s in again)


def count_calls(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    calls: list[int] = []
    original = FrozenLM.resid_and_final

    def counted(self: FrozenLM, ids: torch.Tensor, layer: int) -> Any:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(len(ids))
        return original(self, ids, layer)

    monkeypatch.setattr(FrozenLM, "resid_and_final", counted)
    return calls


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    ],
)
def test_out_of_memory_halves_the_micro_batch(
    inputs: TextInputs,
    context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    sizes: list[int] = []
    original = FrozenLM.resid_and_final

    def limited(self: FrozenLM, ids: torch.Tensor, layer: int) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise error
        return original(self, ids, layer)

    plain = context("plain")
    STAGE.run(inputs, settings(), plain)
    monkeypatch.setattr(FrozenLM, "resid_and_final", limited)
    ctx = context("limited")
    STAGE.run(inputs, settings(micro_batch_sequences=8, shard_tokens=3 * LENGTH), ctx)
    assert sizes[0] == 3
    assert max(sizes[2:]) <= 2
    assert files_of(ctx.out) == files_of(plain.out)

    def never(self: FrozenLM, ids: torch.Tensor, layer: int) -> Any:
        raise error

    monkeypatch.setattr(FrozenLM, "resid_and_final", never)
    with pytest.raises(NoResourceError, match="single sequence"):
        STAGE.run(inputs, settings(), context("never"))


def test_other_runtime_errors_are_not_swallowed(
    inputs: TextInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: FrozenLM, ids: torch.Tensor, layer: int) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(FrozenLM, "resid_and_final", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        STAGE.run(inputs, settings(), context())


def test_too_little_disk_is_said_before_the_start(
    inputs: TextInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    ctx = context()
    with pytest.raises(NoResourceError, match=r"needs 0\.00 GB on disk and 1,000,000\.00 GB"):
        STAGE.run(inputs, settings(disk_reserve_bytes=10**15), ctx)
    assert calls == []
    assert files_of(ctx.progress) == {}


def test_nan_in_activations_is_an_error(
    inputs: TextInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FrozenLM.resid_and_final

    def spoiled(self: FrozenLM, ids: torch.Tensor, layer: int) -> Any:
        resid, final = original(self, ids, layer)
        resid[0, 3, 5] = float("nan")
        return resid, final

    monkeypatch.setattr(FrozenLM, "resid_and_final", spoiled)
    ctx = context()
    with pytest.raises(NumericalError, match="`resid` hold NaN"):
        STAGE.run(inputs, settings(), ctx)
    assert files_of(ctx.out) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_layer": 5}, "The model has 4 blocks"),
        ({"budget_tokens": {"test": LENGTH - 1}}, "One sequence has 16 tokens"),
        ({"budget_tokens": {"train": 0}}, "no tokens to train on"),
    ],
)
def test_bad_settings_are_named(
    inputs: TextInputs,
    context: MakeContext,
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(BadInputError, match=message):
        STAGE.run(inputs, settings(**changes), context())


def test_the_model_is_proven_at_the_layer_in_use(
    inputs: TextInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is cached: what every later stage cuts is that layer."""
    seen: list[dict[str, Any]] = []

    def prove(lm: FrozenLM, **how: Any) -> None:
        seen.append(how)
        raise BadInputError("not exact")

    monkeypatch.setattr("rldecoder.stages.cache_activations.prove", prove)
    with pytest.raises(BadInputError, match="not exact"):
        STAGE.run(inputs, settings(hook_layer=3), context())
    assert seen == [{"hook_layer": 3}]
