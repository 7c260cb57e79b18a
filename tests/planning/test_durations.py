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

# docs/results.md: the linear quickstart of e0e4cac on a Zen 5 with bfloat16, seconds by stage.
ZEN5 = {
    "sync_tokenizer": 25.9, "ingest": 5.3, "baselines": 31.9, "cache_activations": 75.2,
    "train_sae": 30.6, "gate_sae": 18.2, "train_decoder": 50.2, "gate_decoder": 8.5,
    "train_ppo": 45.4, "control_ppo": 106.5, "rank_features": 18.3, "label_features": 8.6,
    "cluster_features": 4.9, "train_explainer": 116.1, "evaluate": 28.6, "report": 3.4,
}  # fmt: skip
# The same run at c94d764 on a Zen 3 with AVX2 alone; 2,144 seconds in all.
ZEN3_CACHE, ZEN3_TOTAL = 423.0, 2144.0


def expected(cache_seconds: float) -> dict[str, float]:
    run = load_run_config(ROOT / "configs" / "linear.yaml")
    sizes = model_sizes(run.sync_tokenizer)
    rate = stage_cost("cache_activations", Sizing(run, sizes)).flops / cache_seconds
    return expected_seconds(run, sizes.constants, rate)


def test_the_run_that_the_paces_are_of() -> None:
    seconds = expected(ZEN5["cache_activations"])
    assert list(seconds) == [stage.name for stage in STAGES] == list(PACES)
    assert sum(seconds.values()) == pytest.approx(sum(ZEN5.values()), rel=0.15)
    for name, took in ZEN5.items():
        assert took / 1.7 < seconds[name] < took * 1.7, name


def test_a_machine_that_the_paces_are_not_of() -> None:
    assert sum(expected(ZEN3_CACHE).values()) == pytest.approx(ZEN3_TOTAL, rel=0.3)


def test_what_is_left_follows_what_was_measured() -> None:
    plan = {"a": 100.0, "b": 200.0, "c": 300.0}
    assert seconds_left(plan, {}, 0) == 600
    assert seconds_left(plan, {"a": 0.0}, 0.0) == 600
    # Twice as slow as expected: what is left takes nearly twice as long.
    slow = seconds_left(plan, {"a": 200.0, "b": 200.0}, 0.5)
    assert 400 < slow < 800
    assert slow > seconds_left(plan, {"a": 100.0, "b": 100.0}, 0.5) == pytest.approx(400)
    assert seconds_left(plan, {"a": 9.0, "b": 9.0, "c": 9.0}, 1.0) == 0
