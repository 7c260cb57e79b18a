"""The picture of what was trained on what."""

from __future__ import annotations

from rldecoder.dashboard.architecture import architecture_plot
from tests.dashboard.drawn import SIZES, texts


def test_the_architecture_tells_the_sizes_of_the_run() -> None:
    linear = texts(architecture_plot(SIZES._replace(depth=0)))
    assert {"24 blocks", "6 blocks", "smollm2-135m", "5,760 latents, 64 active"} <= set(linear)
    assert "linear" in linear
    assert "2 blocks" in texts(architecture_plot(SIZES))
