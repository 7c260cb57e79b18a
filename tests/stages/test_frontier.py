"""The frontier on a tiny model: cells, controls, verdict, resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rldecoder.artifacts.catalogue import Frontier, Sweep
from rldecoder.config.decoder import DistillConfig, FrontierConfig
from rldecoder.config.run import RunConfig
from rldecoder.decoder.frontier import FrontierCell, recommend
from rldecoder.errors import BadInputError
from rldecoder.stages import frontier
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import FrontierInputs
from rldecoder.stages.table import stage_named
from tests.stages.published import published
from tests.stages.token_inputs import small_sweep, token_inputs

STAGE = stage_named("frontier")
LENGTH = 16
SWEEP = small_sweep(LENGTH, (2, 3), (8,))
CONFIG = FrontierConfig(
    depths=(0, 1),
    train_tokens=1024,
    test_tokens=256,
    training=DistillConfig(
        epochs=1, budget_tokens=512, batch_tokens=64, lr=1e-3, blocks_lr=1e-3, fit_tokens=1024
    ),
)

MakeContext = Callable[..., StageContext]


@pytest.fixture(scope="module")
def inputs(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> FrontierInputs:
    from tests.conftest import make_context

    folder = tmp_path_factory.mktemp("ingest")
    text = token_inputs(folder, tiny_lm_dir, LENGTH, {"train": 64, "test": 16})
    ctx = make_context(tmp_path_factory.mktemp("sweep"))
    stage_named("sweep_sae").run(text, SWEEP, ctx)
    return FrontierInputs(text.model, text.corpus, published(Sweep, ctx.out))


def cells(ctx: StageContext) -> pa.Table:
    table = published(Frontier, ctx.out).cells
    assert table is not None
    return table


def test_every_depth_is_measured_beside_floor_lens_and_control(
    inputs: FrontierInputs, context: MakeContext
) -> None:
    ctx = context()
    output = STAGE.run(inputs, CONFIG, ctx)
    rows = cells(ctx).to_pylist()
    assert [(row["layer"], row["depth"], row["sae"]) for row in rows] == [
        (layer, depth, source)
        for layer in (2, 3)
        for depth, source in ((0, "trained"), (1, "trained"), (1, "random"))
    ]
    cell = {(row["layer"], row["depth"], row["sae"]): row for row in rows}
    for row in rows:
        assert row["kl_low"] <= row["kl"] <= row["kl_high"]
        assert row["tokens_trained"] >= 8 * 60
        assert row["splice_kl"] > 0
    for layer in (2, 3):
        linear, deep = cell[layer, 0, "trained"], cell[layer, 1, "trained"]
        assert deep["parameters"] > linear["parameters"]
        assert deep["flops_per_token"] > linear["flops_per_token"]
        assert linear["parameters"] == 128 * 64 + 64
        assert linear["residual_lens_kl"] == deep["residual_lens_kl"]
        # A random SAE of the same L0 loses more, to the frozen model's own blocks at least.
        assert cell[layer, 1, "random"]["splice_kl"] > deep["splice_kl"]
    assert set(published(Frontier, ctx.out).verdict_record.depths) == {2, 3}
    assert output.metrics["cells"] == 6
    assert Frontier.figure.path(ctx.out).read_text().startswith("<?xml")


def test_a_killed_frontier_goes_on(
    inputs: FrontierInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = context("whole"), context("killed")
    STAGE.run(inputs, CONFIG, whole)
    original, calls = frontier._cell, []

    def limited(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(frontier, "_cell", limited)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(inputs, CONFIG, killed)
    STAGE.run(inputs, CONFIG, killed)
    assert len(calls) == 3 + 4
    tables = [cells(ctx) for ctx in (whole, killed)]
    assert tables[0].drop(["train_seconds"]) == tables[1].drop(["train_seconds"])


def test_no_depths_no_frontier(inputs: FrontierInputs, context: MakeContext) -> None:
    ctx = context()
    assert STAGE.run(inputs, FrontierConfig(), ctx).metrics == {"cells": 0}
    verdict = published(Frontier, ctx.out).verdict_record
    assert "no frontier" in verdict.why
    assert json.loads(Frontier.verdict_record.path(ctx.out).read_text()) == {
        "meets_limit": None, "why": verdict.why, "depths": {}
    }  # fmt: skip


def test_more_blocks_than_there_are(inputs: FrontierInputs, context: MakeContext) -> None:
    with pytest.raises(BadInputError, match="1 blocks"):
        STAGE.run(inputs, CONFIG.model_copy(update={"depths": (2,)}), context())
    only = CONFIG.model_copy(update={"depths": (3,), "layers": (2,)})
    with pytest.raises(BadInputError, match="2 blocks"):
        STAGE.run(inputs, only, context())


def row(layer: int, depth: int, kl: float, k: int = 8) -> FrontierCell:
    rest = ("expansion", "start_kl", "kl_low", "kl_high", "agreement", "splice_kl",
            "residual_lens_kl", "flops_per_token", "train_seconds")  # fmt: skip
    return FrontierCell(
        layer=layer, depth=depth, kl=kl, k=k, sae="trained", parameters=1, tokens_trained=1,
        **dict.fromkeys(rest, 0.5),
    )  # fmt: skip


def test_the_least_depth_that_is_enough_is_recommended() -> None:
    rows = [row(8, 0, 3.0), row(8, 4, 1.0), row(15, 0, 2.0), row(15, 2, 0.6), row(15, 2, 0.45, 16),
            row(15, 4, 0.4), row(24, 0, 0.7), row(24, 2, 0.3)]  # fmt: skip
    verdict = recommend(rows, 0.5)
    assert verdict.depths == {8: 4, 15: 2, 24: 2}
    assert (verdict.layer, verdict.depth, verdict.k) == (15, 2, 16)
    assert verdict.meets_limit
    verdict = recommend(rows, 0.1)
    assert not verdict.meets_limit
    assert verdict.depths == {8: 4, 15: 4, 24: 2}
    assert (verdict.layer, verdict.depth) == (24, 2)


def run_config(**changes: object) -> RunConfig:
    values: dict[str, object] = {
        "name": "x",
        "sync_tokenizer": {"model": "random"},
        "cache_activations": {"hook_layer": 2},
        "baselines": {"lens_layers": [2]},
    }
    return RunConfig.model_validate(values | changes)


def test_a_frontier_needs_saes_and_auto_needs_a_frontier() -> None:
    with pytest.raises(ValueError, match=r"sweep_sae.layers is empty"):
        run_config(frontier={"depths": [0]})
    with pytest.raises(ValueError, match="not part of"):
        run_config(sweep_sae={"layers": [2]}, frontier={"depths": [0], "layers": [3]})
    with pytest.raises(ValueError, match="auto needs a frontier"):
        run_config(train_decoder={"depth": "auto"})
    run_config(sweep_sae={"layers": [2]}, frontier={"depths": [0]}, train_decoder={"depth": "auto"})
