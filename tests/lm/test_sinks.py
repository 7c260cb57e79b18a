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


def test_tokens_that_begin_a_text_are_sinks_wherever_they_stand() -> None:
    resid = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    resid[3] *= 50
    ids = torch.tensor([5, 1, 2, 3, 1, 7])
    assert is_sink(resid, ids, (1,)).nonzero().flatten().tolist() == [1, 3, 4]
    assert is_sink(resid, ids, ()).nonzero().flatten().tolist() == [3]
