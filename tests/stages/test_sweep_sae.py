"""The sweep on a tiny model: cells, controls, verdict, resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rldecoder.artifacts.catalogue import Sweep
from rldecoder.config.sae import SweepSaeConfig
from rldecoder.errors import BadInputError
from rldecoder.sae import sweep as sae_sweep
from rldecoder.sae.sweep import Setting, SweepCell, choose
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import TextInputs
from rldecoder.stages.table import stage_named
from tests.stages.published import published
from tests.stages.token_inputs import small_sweep, token_inputs

STAGE = stage_named("sweep_sae")

MakeContext = Callable[..., StageContext]
LENGTH = 24
CONFIG = small_sweep(LENGTH, (1, 3), (4, 8))


@pytest.fixture(scope="module")
def inputs(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TextInputs:
    folder = tmp_path_factory.mktemp("ingest")
    return token_inputs(folder, tiny_lm_dir, LENGTH, {"train": 60, "test": 12})


def test_every_cell_is_measured_against_its_controls(
    inputs: TextInputs, context: MakeContext
) -> None:
    ctx = context()
    output = STAGE.run(inputs, CONFIG, ctx)
    sweep = published(Sweep, ctx.out)
    assert sweep.cells is not None
    rows = sweep.cells.to_pylist()
    assert [(row["layer"], row["k"]) for row in rows] == [(1, 4), (1, 8), (3, 4), (3, 8)]
    for row in rows:
        assert 0 < row["fvu"] < 1
        assert row["l0"] == pytest.approx(row["k"], abs=0.5)
        assert row["splice_kl"] > 0
        # The raw residual holds all that an SAE's reconstruction of it does.
        assert row["residual_lens_kl"] <= row["decoder_kl"] * 1.05
    by_layer = {(row["layer"], row["k"]): row for row in rows}
    assert by_layer[3, 8]["fvu"] < by_layer[3, 4]["fvu"]
    # The last block's output is closer to the final hidden state.
    assert by_layer[3, 8]["residual_lens_kl"] < by_layer[1, 8]["residual_lens_kl"]
    assert output.metrics["cells"] == 4
    assert sweep.figure.read_text().startswith("<?xml")
    sae = sweep.load(Setting(3, 8, 2.0))
    assert (sae.spec.hook_layer, sae.spec.k, sae.spec.num_latents) == (3, 8, 128)


def test_a_killed_sweep_goes_on(
    inputs: TextInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = context("whole"), context("killed")
    STAGE.run(inputs, CONFIG, whole)
    original, calls = sae_sweep.train_small, []

    def limited(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(sae_sweep, "train_small", limited)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(inputs, CONFIG, killed)
    weights = min(Sweep.saes.path(killed.progress).rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    STAGE.run(inputs, CONFIG, killed)
    assert len(calls) == 3 + 3  # the damaged one too
    assert weights.read_bytes()[-1:] != b"?"
    for file in (Sweep.cells, Sweep.verdict_record, Sweep.figure):
        assert file.path(killed.out).read_bytes() == file.path(whole.out).read_bytes()


def test_no_layers_no_sweep(inputs: TextInputs, context: MakeContext) -> None:
    ctx = context()
    assert STAGE.run(inputs, SweepSaeConfig(), ctx).metrics == {"cells": 0}
    verdict = published(Sweep, ctx.out).verdict_record
    assert "no sweep" in verdict.why
    assert json.loads(Sweep.verdict_record.path(ctx.out).read_text()) == {
        "meets_limits": None, "why": verdict.why
    }  # fmt: skip


def test_layers_out_of_range(inputs: TextInputs, context: MakeContext) -> None:
    with pytest.raises(BadInputError, match="4 blocks"):
        STAGE.run(inputs, CONFIG.model_copy(update={"layers": (5,)}), context())


def row(layer: int, decoder_kl: float, splice_kl: float = 0.1) -> SweepCell:
    rest = ("expansion", "fvu", "l0", "dead_fraction", "decoder_agreement", "residual_lens_kl",
            "random_sae_kl")  # fmt: skip
    return SweepCell(
        layer=layer, k=8, decoder_kl=decoder_kl, splice_kl=splice_kl, **dict.fromkeys(rest, 0.5)
    )


def test_the_earliest_layer_within_the_limits_is_chosen() -> None:
    rows = [row(8, 2.6), row(15, 1.4, 0.9), row(24, 1.3), row(24, 1.0), row(27, 0.7)]
    verdict = choose(rows, SweepSaeConfig())
    assert verdict.cell == row(24, 1.0)
    assert verdict.meets_limits
    assert "layer 24 is the earliest" in verdict.why
    verdict = choose(rows, SweepSaeConfig(max_decoder_kl=0.5))
    assert verdict.cell == row(27, 0.7)
    assert not verdict.meets_limits
