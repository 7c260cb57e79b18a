"""Settings of the supervised decoder, its frontier and its gate."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rldecoder.config.decoder import FrontierConfig, GateDecoderConfig, TrainDecoderConfig


@pytest.mark.parametrize(
    "wrong",
    [{"depth": -1}, {"depth": "deep"}, {"lr": 0}, {"warmup_fraction": 1}, {"ce_weight": 1.1},
     {"fit_tokens": 255}, {"matmul_precision": "low"}, {"budget_tokens": 0}],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TrainDecoderConfig.model_validate(wrong)


def test_depth_is_a_number_or_the_frontiers() -> None:
    assert TrainDecoderConfig.model_validate({"depth": "auto"}).depth == "auto"
    assert TrainDecoderConfig.model_validate({"depth": 6}).depth == 6


def test_a_frontier_trains_each_decoder_once_over_its_tokens() -> None:
    config = FrontierConfig()
    assert config.training.epochs == 1
    assert config.training.budget_tokens == config.train_tokens


def test_how_often_is_saved_and_what_a_failed_gate_does_change_no_address() -> None:
    saved = TrainDecoderConfig(checkpoint_every_steps=7)
    assert saved.digest_fields() == TrainDecoderConfig().digest_fields()
    assert GateDecoderConfig(on_fail="warn").digest_fields() == GateDecoderConfig().digest_fields()
    assert GateDecoderConfig(max_kl=9.0).digest_fields() != GateDecoderConfig().digest_fields()
