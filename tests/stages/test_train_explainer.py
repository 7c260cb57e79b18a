"""The stage on the debug run's real artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from rldecoder import Run
from rldecoder.artifacts.catalogue import TrainedExplainer
from rldecoder.config.run import RunConfig
from rldecoder.curves import read_curves
from rldecoder.explain.claims import Verdict
from rldecoder.explain.explainer import FILES
from rldecoder.explain.held_out_texts import PROSE
from rldecoder.explain.methods import BASELINES
from rldecoder.explain.pair_shards import PairWorker
from rldecoder.explain.pairs import PAIRS
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import ExplainerInputs
from rldecoder.stages.table import stage_named
from tests.executors.elsewhere import Elsewhere

STAGE = stage_named(TrainedExplainer.stage)


@pytest.fixture(scope="module")
def inputs(run: Run) -> ExplainerInputs:
    return run.inputs(ExplainerInputs)


@pytest.fixture(scope="module")
def trained(run: Run) -> TrainedExplainer:
    """What the debug run published."""
    return run.artifact(TrainedExplainer)


@pytest.fixture
def rerun(inputs: ExplainerInputs, config: RunConfig, context: Callable[..., StageContext]) -> Path:
    seed = derive_seed(config.seed, STAGE.name)
    seed_everything(seed)
    ctx = context(STAGE.name, seed=seed)
    STAGE.run(inputs, config.train_explainer, ctx)
    return ctx.out


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(rerun: Path, trained: TrainedExplainer) -> None:
    names = {file.name for file in rerun.iterdir()}
    assert names == {file.name for file in TrainedExplainer.files().values()} | set(FILES)
    for name in names:
        assert (rerun / name).read_bytes() == (trained.folder / name).read_bytes(), name


@pytest.mark.slow
def test_what_is_published(trained: TrainedExplainer, config: RunConfig) -> None:
    pairs = trained.pairs
    assert pairs.schema == PAIRS
    assert pairs.num_rows == config.train_explainer.num_pairs
    assert {"text", "addition", "cloze"} == set(pairs["source"].to_pylist())
    explainer = trained.load()
    held_out = set(trained.held_out.root)
    share = config.train_explainer.held_out_features
    assert len(held_out) == round(share * explainer.spec.num_latents) > 0
    assert not held_out & {latent for row in pairs["latents"].to_pylist() for latent in row}
    assert not held_out & {latent for row in pairs["rationale"].to_pylist() for latent in row}
    assert float(explainer.scales.max()) > 0
    assert float(explainer.importance.max()) > 0
    evaluation = trained.evaluation
    assert evaluation.num_positions == config.train_explainer.num_test_positions
    renamed = evaluation.renamed_labels
    assert renamed.num_examples == renamed.num_unchanged >= 3
    if evaluation.num_explained:
        kinds = evaluation.simulatability.kinds
        assert set(kinds) == {"removal", "halving", "amplifying", "swapping", "all"}
        readers = set(kinds["all"].methods)
        assert not readers or {"method_b", *BASELINES} <= readers
    curves = read_curves(TrainedExplainer.curves.path(trained.folder))
    assert set(curves) == {"loss", "pointer", "effect", "sure"}
    examples = trained.examples.root
    assert [example.prompt for example in examples] == list(PROSE)
    for example in examples:
        assert "because" not in example.method_a.lower()
        for checked in example.claims:
            assert checked.verdict in get_args(Verdict)
    verdicts = Counter(checked.verdict for example in examples for checked in example.claims)
    assert evaluation.example_verdicts == {name: verdicts[name] for name in get_args(Verdict)}


@pytest.mark.slow
def test_a_killed_run_takes_its_pairs_up_with_the_same_bytes(
    inputs: ExplainerInputs,
    trained: TrainedExplainer,
    config: RunConfig,
    context: Callable[..., StageContext],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seed = derive_seed(config.seed, STAGE.name)
    ctx = context("killed", seed=seed)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    # The pairs are a cluster's, whose workers load the models and draw the positions themselves.
    seed_everything(seed)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("rldecoder.stages.train_explainer._train", killed)
        STAGE.run(inputs, config.train_explainer, replace(ctx, executor=Elsewhere()))
    seed_everything(seed)
    with monkeypatch.context() as patched:
        patched.setattr(PairWorker, "compute", killed)
        STAGE.run(inputs, config.train_explainer, ctx)
    for name in (*FILES, "pairs.parquet", "evaluation.json"):
        assert (ctx.out / name).read_bytes() == (trained.folder / name).read_bytes(), name
