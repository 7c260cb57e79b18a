"""Sinks are found by their norm, and nothing else is taken for one."""

from __future__ import annotations

import torch

from rldecoder.lm.sinks import is_sink


def test_only_the_very_long_are_sinks() -> None:
    resid = torch.nn.functional.normalize(torch.randn(100, 8), dim=1)
    resid[3] *= 50
    resid[7] *= 9
    resid[9] = float("nan")
    assert is_sink(resid.bfloat16()).nonzero().flatten().tolist() == [3]
