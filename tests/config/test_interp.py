"""Settings of ranking and labelling: sections that need each other."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rldecoder.config.interp import LabelFeaturesConfig, RankFeaturesConfig
from rldecoder.config.llm import simulation_tokens

LLM = {"labelers": ["predicate", "llm"]}


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"domains": ["label"], "validation_domain": "ood"}, "not in domains"),
        ({"targets": []}, "targets is empty"),
    ],
)
def test_rankings_that_rank_nothing_are_refused(wrong: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        RankFeaturesConfig.model_validate(wrong)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"example_tokens": 10, "fit_tokens": 20}, "one pass reads both"),
        ({"labelers": ["predicate", "predicate"]}, "each labeler once"),
        ({"labelers": ["llm"], "llm": {}}, "must hold `predicate`"),
        (LLM, "need each other"),
        ({"llm": {}}, "need each other"),
        ({**LLM, "llm": {"control_latents": 9}, "control_features": 8}, "control_latents"),
        ({**LLM, "llm": {"simulation_windows": 1, "judge_tokens": 20}}, "a number a token"),
    ],
)
def test_labels_that_cannot_be_made_are_refused(wrong: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        LabelFeaturesConfig.model_validate(wrong)


def test_the_longest_simulation_answer_fits() -> None:
    enough = simulation_tokens(LabelFeaturesConfig().window_tokens)
    llm = {"simulation_windows": 1, "judge_tokens": enough}
    assert LabelFeaturesConfig.model_validate({**LLM, "llm": llm}).llm is not None
