"""What the benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def clock(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
