"""The sweep on a tiny model: cells, controls, verdict, resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rldecoder.config.sae import SweepSaeConfig
from rldecoder.errors import BadInputError
from rldecoder.sae.model import Sae
from rldecoder.sae.sweep import choose, sae_folder
from rldecoder.schemas import read_parquet
from rldecoder.stages import sweep_sae
from rldecoder.stages.context import InputArtifact, StageContext
from rldecoder.stages.table import stage_named
from tests.stages.token_inputs import small_sweep, token_inputs

STAGE = stage_named("sweep_sae")

MakeContext = Callable[..., StageContext]
LENGTH = 24
CONFIG = small_sweep(LENGTH, (1, 3), (4, 8))


@pytest.fixture(scope="module")
def inputs(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, InputArtifact]:
    folder = tmp_path_factory.mktemp("ingest")
    return token_inputs(folder, tiny_lm_dir, LENGTH, {"train": 60, "test": 12})


def test_every_cell_is_measured_against_its_controls(
    inputs: Mapping[str, InputArtifact], context: MakeContext
) -> None:
    ctx = context()
    output = STAGE.run(inputs, CONFIG, ctx)
    rows = read_parquet(ctx.out / "sweep.parquet").to_pylist()
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
    assert (ctx.out / "sweep.svg").read_text().startswith("<?xml")
    sae = Sae.load(ctx.out / sae_folder(3, 8, 2.0))
    assert (sae.spec.hook_layer, sae.spec.k, sae.spec.num_latents) == (3, 8, 128)


def test_a_killed_sweep_goes_on(
    inputs: Mapping[str, InputArtifact], context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = context("whole"), context("killed")
    STAGE.run(inputs, CONFIG, whole)
    original, calls = sweep_sae.train_small, []

    def limited(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(sweep_sae, "train_small", limited)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(inputs, CONFIG, killed)
    weights = min((killed.progress / "saes").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    STAGE.run(inputs, CONFIG, killed)
    assert len(calls) == 3 + 3  # the damaged one too
    assert weights.read_bytes()[-1:] != b"?"
    for name in ("sweep.parquet", "verdict.json", "sweep.svg"):
        assert (killed.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_no_layers_no_sweep(inputs: Mapping[str, InputArtifact], context: MakeContext) -> None:
    ctx = context()
    assert STAGE.run(inputs, SweepSaeConfig(), ctx).metrics == {"cells": 0}
    assert "no sweep" in json.loads((ctx.out / "verdict.json").read_text())["why"]


def test_layers_out_of_range(inputs: Mapping[str, InputArtifact], context: MakeContext) -> None:
    with pytest.raises(BadInputError, match="4 blocks"):
        STAGE.run(inputs, CONFIG.model_copy(update={"layers": (5,)}), context())


def row(layer: int, decoder_kl: float, splice_kl: float = 0.1) -> dict[str, float]:
    return {"layer": layer, "decoder_kl": decoder_kl, "splice_kl": splice_kl}


def test_the_earliest_layer_within_the_limits_is_chosen() -> None:
    rows = [row(8, 2.6), row(15, 1.4, 0.9), row(24, 1.3), row(24, 1.0), row(27, 0.7)]
    verdict = choose(rows, SweepSaeConfig())
    assert verdict["cell"] == row(24, 1.0)
    assert verdict["meets_limits"]
    assert "layer 24 is the earliest" in verdict["why"]
    verdict = choose(rows, SweepSaeConfig(max_decoder_kl=0.5))
    assert verdict["cell"] == row(27, 0.7)
    assert not verdict["meets_limits"]
