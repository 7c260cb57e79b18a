"""When training is stopped, and when it is only warned about."""

from __future__ import annotations

from rldecoder.config.rl import CollapseRule
from rldecoder.rl.collapse import CollapseState, CollapseWatch

RULE = CollapseRule(
    patience=2, min_entropy_fraction=0.1, max_clip_fraction=0.5, max_kl_increase=1.0
)
FINE = {"entropy": 2.0, "clip_fraction": 0.1}


def test_healthy_steps_pass():
    watch = CollapseWatch(RULE)
    assert [watch.after_step(FINE) for _ in range(5)] == [None] * 5
    assert watch.after_evaluation(1.0) is None
    assert watch.after_evaluation(1.9) is None


def test_entropy_collapse_needs_patience():
    watch = CollapseWatch(RULE)
    low = {**FINE, "entropy": 0.1}
    assert watch.after_step(FINE) is None
    assert watch.after_step(low) is None
    assert watch.after_step(FINE) is None
    assert watch.after_step(low) is None
    reason = watch.after_step(low)
    assert reason is not None
    assert "entropy" in reason


def test_too_much_clipping():
    watch = CollapseWatch(RULE)
    clipped = {**FINE, "clip_fraction": 0.9}
    assert watch.after_step(clipped) is None
    assert "clip fraction" in (watch.after_step(clipped) or "")


def test_held_out_kl_leaves_the_frozen_model():
    watch = CollapseWatch(RULE)
    watch.after_evaluation(0.5)
    assert "0.50 to 1.60" in (watch.after_evaluation(1.6) or "")


def test_a_peaked_start_is_warned_about_once():
    watch = CollapseWatch(RULE)
    stuck = {**FINE, "clip_fraction": 0.45}
    assert "stuck" in (watch.warning(0, stuck) or "")
    assert watch.warning(1, stuck) is None
    assert watch.warning(0, FINE) is None


def test_state_survives_json():
    watch = CollapseWatch(RULE)
    watch.after_step(FINE)
    watch.after_step({**FINE, "entropy": 0.1})
    watch.after_evaluation(0.5)
    other = CollapseWatch(RULE)
    other.state = CollapseState.model_validate_json(watch.state.model_dump_json())
    assert other.state == watch.state
    assert other.after_step({**FINE, "entropy": 0.1}) is not None
