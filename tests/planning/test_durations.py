"""Expected times against recorded runs: one the paces were taken from, and one they were not."""

from __future__ import annotations

import pytest

from rldecoder.config.run import load_run_config
from rldecoder.planning.costs import stage_cost
from rldecoder.planning.durations import PACES, expected_seconds, seconds_left
from rldecoder.planning.sizes import model_sizes
from rldecoder.planning.sizing import Sizing
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT

# The quickstart of 5661b9b, quiet, on two cores of a Xeon with AMX: seconds by stage.
AMX = {
    "sync_tokenizer": 5.4, "ingest": 3.9, "baselines": 35.3, "cache_activations": 52.7,
    "train_sae": 42.0, "gate_sae": 16.9, "train_decoder": 51.2, "gate_decoder": 8.8,
    "train_ppo": 47.3, "control_ppo": 106.6, "rank_features": 20.0, "label_features": 86.9,
    "cluster_features": 16.7, "train_explainer": 141.5, "evaluate": 63.7, "report": 4.0,
}  # fmt: skip
# That of 2276eee, quiet, on two cores of an EPYC with AVX2 alone; 1,519 seconds in all.
AVX2 = {
    "cache_activations": 273, "train_explainer": 230, "control_ppo": 193, "label_features": 124,
    "evaluate": 112, "train_ppo": 89, "train_sae": 86, "baselines": 79, "gate_sae": 48,
    "rank_features": 35, "cluster_features": 35,
}  # fmt: skip
AVX2_TOTAL = 1519.0
THEN = [
    "ingest.budget_tokens.train=122880", "cache_activations.budget_tokens.train=122880",
    "ingest.budget_tokens.label=16384", "cache_activations.budget_tokens.label=16384",
    "train_sae.budget_tokens=900000", "train_decoder.budget_tokens=30000", "train_sae.k=64",
    "ingest.sources=[{type: pydocs}, {type: reader}, {type: tasks}]",
]  # fmt: skip
"""The settings of both runs where today's differ."""


def expected(cache_seconds: float) -> dict[str, float]:
    run = load_run_config(ROOT / "configs" / "quickstart.yaml", THEN)
    sizes = model_sizes(run.sync_tokenizer)
    rate = stage_cost("cache_activations", Sizing(run, sizes)).flops / cache_seconds
    return expected_seconds(run, sizes.constants, rate)


def test_the_run_that_the_paces_are_of() -> None:
    seconds = expected(AMX["cache_activations"])
    assert list(seconds) == [stage.name for stage in STAGES] == list(PACES)
    assert sum(seconds.values()) == pytest.approx(sum(AMX.values()), rel=0.15)
    # The reference had the weights already; a first run installs them.
    for name, took in AMX.items() - {("sync_tokenizer", 5.4)}:
        assert took / 1.7 < seconds[name] < took * 1.7, name


def test_a_machine_that_the_paces_are_not_of() -> None:
    seconds = expected(AVX2["cache_activations"])
    assert sum(seconds.values()) == pytest.approx(AVX2_TOTAL, rel=0.3)
    for name, took in AVX2.items():
        assert took / 1.7 < seconds[name] < took * 1.7, name


def test_what_is_left_follows_what_was_measured() -> None:
    plan = {"a": 100.0, "b": 200.0, "c": 300.0}
    assert seconds_left(plan, {}, 0) == 600
    assert seconds_left(plan, {"a": 0.0}, 0.0) == 600
    # Twice as slow as expected: what is left takes nearly twice as long.
    slow = seconds_left(plan, {"a": 200.0, "b": 200.0}, 0.5)
    assert 400 < slow < 800
    assert slow > seconds_left(plan, {"a": 100.0, "b": 100.0}, 0.5) == pytest.approx(400)
    assert seconds_left(plan, {"a": 9.0, "b": 9.0, "c": 9.0}, 1.0) == 0
