"""Alerts begin once, end, and come back."""

from __future__ import annotations

from rldecoder.config.sae import TrainSaeConfig
from rldecoder.sae.drift import DriftState, DriftWatch
from rldecoder.sae.training import StepResult

FINE = StepResult(1.0, 1.0, 64.0, 0.0, 1.0, 1e-3, 0.0, 0.0)
CONFIG = TrainSaeConfig(warmup_steps=2)


def kinds(results: list[StepResult]) -> list[list[str]]:
    watch = DriftWatch(CONFIG)
    return [watch.observe(step, result) for step, result in enumerate(results, 1)]


def test_silent_while_all_is_well_and_in_warm_up() -> None:
    assert kinds([FINE._replace(l0=1.0), *[FINE] * 5]) == [[]] * 6


def test_each_kind_speaks_when_it_begins() -> None:
    dead = FINE._replace(dead_fraction=0.5)
    messages = kinds([FINE, FINE, dead, dead, FINE, dead])
    assert [len(m) for m in messages] == [0, 0, 1, 0, 0, 1]
    assert messages[2] == ["SAE training, step 3: dead fraction 0.500 exceeds 0.2."]
    assert "outside 5 to 500" in kinds([FINE, FINE, FINE._replace(l0=900.0)])[2][0]
    assert "jumped" in kinds([FINE, FINE, FINE._replace(loss=4.0)])[2][0]


def test_state_round_trip_continues_in_silence() -> None:
    first = DriftWatch(CONFIG)
    dead = FINE._replace(dead_fraction=0.5)
    assert first.observe(5, dead)
    second = DriftWatch(CONFIG)
    second.state = DriftState.model_validate_json(first.state.model_dump_json())
    assert second.observe(6, dead) == []
    assert second.state.mean_loss == first.state.mean_loss
