"""The targets table: complete, fixed, and honest about what is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from rldecoder.evals.targets import TARGETS, Measurement, Source, TargetRow, Targets, fill_targets

# Written out from SPEC.md, "Targets of the original plan" and the QA gate, not from the code.
PLAN = {
    "kl_supervised": ("< 1.5", 1.49, 1.5),
    "kl_rl": ("< 0.5", 0.49, 0.5),
    "task_drop": ("< 0.03", 0.029, 0.03),
    "l0": ("50 to 100", 50.0, 49.0),
    "mse": ("< 0.01", 0.009, 0.01),
    "explained_variance": ("> 0.95", 0.951, 0.95),
    "dead_fraction": ("< 0.05", 0.0, 0.05),
    "splice_kl": ("< 0.5", 0.3, 0.6),
    "near_duplicates": ("< 0.05", 0.01, 0.05),
    "label_coverage": ("> 0.85", 0.9, 0.85),
    "top10_mass": ("≥ 0.3", 0.3, 0.29),
    "ood_ratio": ("> 0.8", 0.81, 0.8),
    "agreement": ("> 0.75", 0.8, 0.75),
    "claim_precision": ("≥ 0.8", 0.8, 0.79),
    "simulatability": ("< 0.05", 0.049, 0.05),
}


STAGES: dict[Source, str] = {target.source: f"stage of {target.source}" for target in TARGETS}


def row_of(key: str, measured: dict[str, Measurement]) -> TargetRow:
    return fill_targets(measured, STAGES)[key]


@pytest.mark.parametrize("key", PLAN)
def test_every_target_of_the_plan_is_there_with_its_threshold(key: str) -> None:
    text, good, bad = PLAN[key]
    assert row_of(key, {}).target == text
    assert row_of(key, {key: Measurement(good)}).met is True
    assert row_of(key, {key: Measurement(bad)}).met is False


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("key", [target.key for target in TARGETS])
def test_what_was_not_measured_is_unknown_never_met(key: str, value: float | None) -> None:
    row = row_of(key, {key: Measurement(value, "why")})
    assert row.met is None
    assert row.value is None
    assert "why" in row.note


def test_nothing_measured_leaves_nothing_out() -> None:
    rows = fill_targets({}, STAGES).root
    assert [row.key for row in rows] == [target.key for target in TARGETS]
    assert all(row.met is None and row.note for row in rows)


def test_another_threshold_of_a_profile_is_shown_and_changes_no_verdict() -> None:
    row = row_of("kl_supervised", {"kl_supervised": Measurement(2.0, "", 3.0)})
    assert row.profile_target == "< 3"
    assert row.target == "< 1.5"
    assert row.met is False
    same = row_of("l0", {"l0": Measurement(64.0, "", (50.0, 100.0))})
    assert same.profile_target is None
    wide = row_of("l0", {"l0": Measurement(16.0, "", (8.0, 32.0))})
    assert (wide.profile_target, wide.met) == ("8 to 32", False)


def test_unknown_measurements_are_a_mistake() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        fill_targets({"nonsense": Measurement(1.0)}, STAGES)


def test_targets_survive_their_file_and_are_counted(tmp_path: Path) -> None:
    measured = {"kl_rl": Measurement(0.1), "kl_supervised": Measurement(9.0), "l0": Measurement(64)}
    targets = fill_targets(measured, STAGES)
    assert targets["l0"].source_stage == "stage of sae"
    targets.save(tmp_path / "targets.json")
    assert Targets.load(tmp_path / "targets.json") == targets
    assert targets.headline == {
        "targets_met": 2, "targets_missed": 1, "targets_unknown": len(TARGETS) - 3,
    }  # fmt: skip
