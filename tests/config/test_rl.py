"""Settings of PPO that do not fit together."""

from __future__ import annotations

import pytest

from rldecoder.config.rl import PpoSettings, TrainPpoConfig


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"responses_per_prompt": 3}, "responses_per_prompt=3 must divide batch_size=16"),
        ({"minibatches": 5}, "minibatches=5 must divide batch_size=16"),
        ({"interpolation": (0.5, 1.5)}, "less than or equal to 1"),
        ({"interpolation": ()}, "at least 1 item"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        PpoSettings(**wrong)


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ({"clozes": 2}, "task_turns names clozes, but the tasks are addition, cloze"),
        ({"cloze": 0}, "greater than or equal to 1"),
    ],
)
def test_turns_of_unknown_tasks_are_refused(turns, what):
    with pytest.raises(ValueError, match=what):
        TrainPpoConfig(task_turns=turns)


@pytest.mark.parametrize(
    ("factors", "what"),
    [
        ({"clozes": 0}, "ppo.response_kl_factors names clozes, but the tasks are addition, cloze"),
        ({"cloze": -1}, "greater than or equal to 0"),
    ],
)
def test_response_kl_factors_of_unknown_tasks_are_refused(factors, what):
    with pytest.raises(ValueError, match=what):
        TrainPpoConfig(ppo={"response_kl_factors": factors})
