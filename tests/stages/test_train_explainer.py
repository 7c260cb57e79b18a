"""The stage on the debug run's real artifacts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rldecoder import schemas
from rldecoder.artifacts import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.explain.explainer import Explainer
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
    for name in ("pairs.parquet", "explainer.safetensors", "evaluation.json", "examples.json"):
        assert (rerun / name).read_bytes() == (published / name).read_bytes(), name


@pytest.mark.slow
def test_what_is_published(inputs: dict[str, InputArtifact], config: RunConfig) -> None:
    folder = inputs[STAGE.name].path
    pairs = schemas.read_parquet(folder / "pairs.parquet")
    assert pairs.schema == PAIRS
    assert pairs.num_rows == config.train_explainer.num_pairs
    assert {"text", "addition", "cloze"} == set(pairs["source"].to_pylist())
    explainer = Explainer.load(folder)
    assert float(explainer.scales.max()) > 0
    assert float(explainer.importance.max()) > 0
    evaluation = schemas.read_json(folder / "evaluation.json")
    assert evaluation["num_positions"] == config.train_explainer.num_test_positions
    assert set(evaluation["reconstruction"]) == {"removal", "halving"}
    examples = schemas.read_json(folder / "examples.json")
    assert len(examples) >= 3
    for example in examples:
        assert "because" not in example["method_a"].lower()
        for checked in example["claims"]:
            assert checked["verdict"] in ("supported", "contradicted", "too small to tell")
