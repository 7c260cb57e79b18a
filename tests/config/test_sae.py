"""Settings of the SAE: rates, phases and bands that mean something."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rldecoder.config.sae import GateSaeConfig, TrainSaeConfig


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"lr": 1e-4, "lr_final": 1e-3}, "is above lr"),
        ({"architecture": "relu", "sparsity_phases": []}, "at least one entry"),
        ({"matryoshka_prefixes": [0.5, 0.25, 1]}, "must rise"),
        ({"matryoshka_prefixes": [0.25, 0.5]}, "must rise"),
        ({"matryoshka_prefixes": [0, 1]}, "must rise"),
        ({"matryoshka_prefixes": []}, "must rise"),
        ({"alert_l0": [9, 5]}, "has nothing in it"),
        ({"architecture": "gated"}, "architecture"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        TrainSaeConfig.model_validate(wrong)


def test_a_process_takes_a_device() -> None:
    assert TrainSaeConfig(processes=2).num_devices == 2


def test_a_band_may_be_one_number() -> None:
    assert GateSaeConfig(l0_range=(64.0, 64.0)).l0_range == (64.0, 64.0)
    with pytest.raises(ValidationError, match="has nothing in it"):
        GateSaeConfig(l0_range=(65.0, 64.0))
