"""Settings of explanations, evaluation and report."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rldecoder.config.explain import EvaluateConfig, ReportConfig, TrainExplainerConfig


@pytest.mark.parametrize(
    "wrong",
    [{"width": 30}, {"max_claims": 17}, {"max_candidates": 65}, {"held_out_features": 1.0},
     {"task_share": -0.1}, {"bootstrap_resamples": 99}],
)  # fmt: skip
def test_what_an_explainer_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TrainExplainerConfig.model_validate(wrong)


def test_tasks_are_those_that_exist() -> None:
    with pytest.raises(ValidationError, match="tasks"):
        EvaluateConfig.model_validate({"tasks": ["chess"]})


def test_what_is_generated_together_changes_no_address_and_what_is_shown_does() -> None:
    assert EvaluateConfig(batch_size=1).digest_fields() == EvaluateConfig().digest_fields()
    assert ReportConfig(title="x").digest_fields() != ReportConfig().digest_fields()
