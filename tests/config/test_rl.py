"""Settings of PPO that do not fit together."""

from __future__ import annotations

import pytest

from rldecoder.config.rl import PpoSettings


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
