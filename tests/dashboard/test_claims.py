"""The tables about claims show what was measured, each number in its column."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rldecoder.dashboard.claims import (
    HELD_OUT_NAME,
    METHOD_NAMES,
    READERS,
    precision_columns,
    precision_note,
    precision_rows,
    simulation_columns,
    simulation_note,
    simulation_rows,
)
from rldecoder.explain.claim_scores import ClaimEvaluation
from rldecoder.explain.plan_values import ahead_of_method_a, claim_precision, simulatability


def precision(value: float) -> dict[str, Any]:
    return {
        "precision": value, "precision_low": value - 0.1, "precision_high": value + 0.1,
        "sign_accuracy": 0.9, "contradicted": 0.01, "decoder_agrees": 0.625, "effect_share": 0.4,
        "claims_per_position": 2.0, "strength_mae_nats": None, "held_out_features": None,
        "other_features": None,
    }  # fmt: skip


def aurocs(values: dict[str, float], pvalues: dict[str, float]) -> dict[str, Any]:
    return {
        name: {
            "auroc": value, "low": value - 0.05, "high": value + 0.05,
            "method_b_ahead": None
            if name == "method_b"
            else {
                "difference": values["method_b"] - value, "low": 0.0, "high": 0.2,
                "pvalue": pvalues.get(name, 0.001),
            },
        }
        for name, value in values.items()
    }  # fmt: skip


@pytest.fixture
def claims() -> dict[str, Any]:
    ours = precision(0.81)
    ours["held_out_features"] = {
        "precision": 0.77, "precision_low": 0.6, "precision_high": 0.9, "num_claims": 60,
        "num_positions": 50,
    }  # fmt: skip
    errors = {"claims_mae_nats": 0.2, "zero_mae_nats": 0.9, "first_order_mae_nats": 0.5}
    values = {name: 0.9 - 0.01 * place for place, name in enumerate(METHOD_NAMES)}
    read = aurocs(values | {"no_claims": 0.7}, {"attribution_top_k": 0.3, "method_a": 0.02})
    plain = aurocs(values, {"prompt_only": 0.04})
    kind = {"seen_in_training": False, "changed": 0.4, "mean_abs_effect_nats": 0.3,
            "methods": plain, "with_context": read}  # fmt: skip
    return {
        "num_positions": 300, "num_explained": 200, "num_pairs": 5000, "abstention": 1 / 3,
        "min_effect_nats": 0.05, "median_noise_nats": 0.02, "num_held_out_features": 576,
        "methods": {name: precision(0.5) for name in METHOD_NAMES} | {"method_b": ours},
        "method_b_against": {
            name: {"difference": 0.31, "low": 0.2, "high": 0.4, "pvalue": 0.0005}
            for name in METHOD_NAMES if name != "method_b"
        },
        "reconstruction": {"removal": errors | {"claims_mae_nats": 0.333}, "halving": errors},
        "simulatability": {
            "interventions_per_kind": 800,
            "kinds": dict.fromkeys(("removal", "halving", "amplifying", "swapping", "all"), kind),
        },
        "renamed_labels": {"num_examples": 6, "num_unchanged": 6},
        "example_verdicts": {"supported": 5, "contradicted": 1, "too small to tell": 7},
    }  # fmt: skip


def record(claims: dict[str, Any]) -> ClaimEvaluation:
    return ClaimEvaluation.model_validate(claims)


def test_precision_table_has_held_out_features(claims: dict[str, Any]) -> None:
    rows = {row[0]: row for row in precision_rows(record(claims))}
    assert set(rows) == {*METHOD_NAMES.values(), HELD_OUT_NAME}
    assert {len(row) for row in rows.values()} == {len(precision_columns())}
    assert rows["Method B"][1] == "0.810"
    assert rows["Method B"][4:6] == ["0.625", "0.400"]
    assert rows[HELD_OUT_NAME][1:] == ["0.770", *[""] * 7]
    note = precision_note(record(claims))
    for part in (
        "576 features",
        "60 claims",
        "77 % hold",
        "0.333",
        "6 of 6",
        "claims: 5 supported, 1 contradicted, 7 too small to tell",
    ):
        assert part in note


def test_simulation_table_has_every_reader_and_its_p(claims: dict[str, Any]) -> None:
    rows = {row[0]: row for row in simulation_rows(record(claims))}
    assert set(rows) == set(READERS.values())
    assert {len(row) for row in rows.values()} == {len(simulation_columns())}
    assert rows["Method B"][1:6] == ["0.900"] * 5
    first_order = rows[METHOD_NAMES["attribution_top_k"]]
    assert first_order[6:8] == ["+0.030", "0.0010"]
    assert first_order[8:] == ["0.870", "+0.030", "0.3000"]
    assert rows["no explanation"][1:8] == [""] * 7
    assert rows["no explanation"][8] == "0.700"
    assert "800 random interventions" in simulation_note(record(claims))


def test_targets_take_the_hardest_listed_baseline(claims: dict[str, Any]) -> None:
    found = simulatability(record(claims))
    assert found.value == 0.3
    assert "attribution_top_k 0.870" in found.note
    assert "0.0400 (prompt_only)" in found.note
    # The variant of attribution is no listed baseline.
    table = copy.deepcopy(claims["simulatability"]["kinds"]["all"])
    table["with_context"]["attribution_above_noise"]["method_b_ahead"]["pvalue"] = 0.9
    claims["simulatability"]["kinds"]["all"] = table
    assert simulatability(record(claims)).value == 0.3
    shown = claim_precision(record(claims))
    assert shown.value == 0.81
    assert "0.71 to 0.91" in shown.note
    assert "33 %" in shown.note
    assert "62 % of the claims" in shown.note


def test_nothing_claimed_shows_nothing_and_is_unknown(claims: dict[str, Any]) -> None:
    bare = claims | {
        "methods": {}, "method_b_against": {}, "num_explained": 0,
        "simulatability": {"interventions_per_kind": 0, "kinds": {}},
    }  # fmt: skip
    assert precision_rows(record(bare)) == simulation_rows(record(bare)) == []
    assert simulation_note(record(bare)) == ""
    assert "0 of 300" in precision_note(record(bare))
    for measure in (ahead_of_method_a, claim_precision, simulatability):
        found = measure(record(bare))
        assert found.value is None
        assert found.note
    one_outcome = claims["simulatability"]["kinds"]["all"] | {"methods": {}, "with_context": {}}
    claims["simulatability"]["kinds"] = dict.fromkeys(
        claims["simulatability"]["kinds"], one_outcome
    )
    assert simulation_rows(record(claims)) == []
    assert simulatability(record(claims)).value is None
