"""Silence while open, and the settings of before afterwards."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from rldecoder.lm.quiet import quiet_transformers


def fail_in_silence() -> None:
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.ERROR
        raise ValueError("broken")


def test_settings_come_back_even_after_an_error() -> None:
    before = (logging.is_progress_bar_enabled(), logging.get_verbosity())
    with pytest.raises(ValueError, match="broken"):
        fail_in_silence()
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
