"""The stage on the debug run's real artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from rldecoder import schemas
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.curves import read_curves
from rldecoder.explain.claims import Verdict
from rldecoder.explain.explainer import Explainer
from rldecoder.explain.methods import BASELINES
from rldecoder.explain.pairs import PAIRS
from rldecoder.runner import plan, read_input
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import InputArtifact, StageContext
from rldecoder.stages.table import stage_named

STAGE = stage_named("train_explainer")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_run_config(ROOT / "configs" / "debug.yaml")


@pytest.fixture(scope="module")
def inputs(debug_store: Path, config: RunConfig) -> dict[str, InputArtifact]:
    refs, store = plan(config), ArtifactStore(debug_store)
    return {name: read_input(store, refs[name]) for name in (*STAGE.inputs, STAGE.name)}


@pytest.fixture
def rerun(
    inputs: dict[str, InputArtifact], config: RunConfig, context: Callable[..., StageContext]
) -> Path:
    seed = derive_seed(config.seed, STAGE.name)
    seed_everything(seed)
    ctx = context(STAGE.name, seed=seed)
    STAGE.run(inputs, config.train_explainer, ctx)
    return ctx.out


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(rerun: Path, inputs: dict[str, InputArtifact]) -> None:
    published = inputs[STAGE.name].path
    for name in (
        "pairs.parquet", "explainer.safetensors", "evaluation.json", "examples.json",
        "curves.parquet", "held_out_features.json",
    ):  # fmt: skip
        assert (rerun / name).read_bytes() == (published / name).read_bytes(), name


@pytest.mark.slow
def test_what_is_published(inputs: dict[str, InputArtifact], config: RunConfig) -> None:
    folder = inputs[STAGE.name].path
    pairs = schemas.read_parquet(folder / "pairs.parquet")
    assert pairs.schema == PAIRS
    assert pairs.num_rows == config.train_explainer.num_pairs
    assert {"text", "addition", "cloze"} == set(pairs["source"].to_pylist())
    explainer = Explainer.load(folder)
    held_out = set(schemas.read_json(folder / "held_out_features.json"))
    share = config.train_explainer.held_out_features
    assert len(held_out) == round(share * explainer.spec.num_latents) > 0
    assert not held_out & {latent for row in pairs["latents"].to_pylist() for latent in row}
    assert not held_out & {latent for row in pairs["rationale"].to_pylist() for latent in row}
    assert float(explainer.scales.max()) > 0
    assert float(explainer.importance.max()) > 0
    evaluation = schemas.read_json(folder / "evaluation.json")
    assert evaluation["num_positions"] == config.train_explainer.num_test_positions
    assert set(evaluation["reconstruction"]) == {"removal", "halving"}
    assert set(evaluation["ablation"]["reconstruction"]) == {"removal", "halving"}
    renamed = evaluation["renamed_labels"]
    assert renamed["num_examples"] == renamed["num_unchanged"] >= 3
    if evaluation["num_explained"]:
        kinds = evaluation["simulatability"]["kinds"]
        assert set(kinds) == {"removal", "halving", "amplifying", "swapping", "all"}
        readers = set(kinds["all"]["methods"])
        assert not readers or {"method_b", "without_regulariser", *BASELINES} <= readers
    curves = read_curves(folder / "curves.parquet")
    assert {"loss", "outcome", "ablation_loss", "ablation_outcome"} <= set(curves)
    # Same weights at the start, same batches: the ablation differs by the regulariser alone.
    assert curves["loss"][1][0] == pytest.approx(curves["ablation_loss"][1][0], rel=0.2)
    examples = schemas.read_json(folder / "examples.json")
    assert len(examples) >= 3
    for example in examples:
        assert "because" not in example["method_a"].lower()
        for checked in example["claims"]:
            assert checked["verdict"] in get_args(Verdict)
    found = evaluation["frozen_model"]
    verdicts = Counter(c["verdict"] for example in examples for c in example["claims"])
    assert {name: count for name, count in found["verdicts"].items() if count} == verdicts
    assert found["num_claims"] == verdicts.total()
    assert found["precision"] == pytest.approx(verdicts["supported"] / verdicts.total())
    assert found["precision_decoder"] >= found["precision"]


@pytest.mark.slow
def test_the_ablation_changes_nothing_about_method_b(
    inputs: dict[str, InputArtifact], config: RunConfig, context: Callable[..., StageContext]
) -> None:
    seed = derive_seed(config.seed, STAGE.name)
    seed_everything(seed)
    ctx = context("without", seed=seed)
    STAGE.run(inputs, config.train_explainer.model_copy(update={"ablation": False}), ctx)
    published = inputs[STAGE.name].path / "explainer.safetensors"
    assert (ctx.out / "explainer.safetensors").read_bytes() == published.read_bytes()
    evaluation = schemas.read_json(ctx.out / "evaluation.json")
    assert "ablation" not in evaluation
    assert set(read_curves(ctx.out / "curves.parquet")) == {
        "loss", "pointer", "effect", "reconstruction", "outcome", "length",
    }  # fmt: skip
