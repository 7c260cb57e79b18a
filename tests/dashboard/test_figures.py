"""Figures: the same bytes every time, no dates, and edge cases that still draw."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from rldecoder.dashboard.architecture import Sizes, architecture_plot
from rldecoder.dashboard.figures import (
    Bar,
    Drawing,
    Line,
    density_plot,
    interval_plot,
    line_plot,
    reliability_plot,
)

DRAWINGS = {
    "lines": lambda: line_plot(
        [Line("a", [0, 1, 2], [1.0, 0.5, 0.4]), Line("b", [0, 2], [0.9, 0.8], dashed=True)],
        x_label="step",
        y_label="KL",
        target=0.5,
    ),
    "one point": lambda: line_plot([Line("a", [3], [1.0])], x_label="step", y_label="KL"),
    "no line": lambda: line_plot([], x_label="step", y_label="KL"),
    "density": lambda: density_plot([0.0, 1e-3, 0.2, 1.0]),
    "all dead": lambda: density_plot([0.0, 0.0]),
    "intervals": lambda: interval_plot(
        {"x": [Bar("one", 0.5, 0.4, 0.6), Bar("two", 0.1, 0.1, 0.1)], "y": []},
        x_label="score",
        target=0.3,
    ),
    "reliability": lambda: reliability_plot([{"n": 5, "mean_p": 0.3, "accepted": 0.4}]),
    "no bins": lambda: reliability_plot([]),
    "architecture": lambda: architecture_plot(SIZES),
}
SIZES = Sizes("smollm2-135m", 24, 30, 576, 5760, "64", 2)


@pytest.mark.parametrize("name", DRAWINGS)
def test_same_bytes_and_plain_svg(name: str) -> None:
    svg, pdf = DRAWINGS[name]()
    assert (svg, pdf) == DRAWINGS[name]()
    assert pdf.startswith(b"%PDF")
    assert b"/Type3" not in pdf  # journals want fonts that can be edited
    assert b"CreationDate" not in pdf
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "date" not in svg.lower()
    assert not any(node.tag.endswith(("script", "foreignObject")) for node in root.iter())


def texts(drawn: Drawing) -> list[str]:
    return [
        node.text or "" for node in ET.fromstring(drawn.svg).iter() if node.tag.endswith("}text")
    ]


def test_text_stays_text_and_is_escaped() -> None:
    drawn = line_plot([Line("a<b>&", [0, 1], [1, 2])] * 2, x_label="x & y", y_label="z")
    assert "a<b>&" in texts(drawn)
    assert "x & y" in texts(drawn)


def test_a_target_far_off_the_data_does_not_flatten_it() -> None:
    near = line_plot([Line("a", [0, 1], [1.0, 0.9])], x_label="x", y_label="y", target=1.5)
    far = line_plot([Line("a", [0, 1], [0.1, 0.2])], x_label="x", y_label="y", target=1.5)
    assert "plan 1.5" in texts(near)
    assert "plan 1.5" not in texts(far)


def test_dead_latents_are_counted() -> None:
    assert "2 of 3 latents never fire" in texts(density_plot([0.0, 0.0, 0.5]))


def test_the_architecture_tells_the_sizes_of_the_run() -> None:
    linear = texts(architecture_plot(SIZES._replace(depth=0)))
    assert {"24 blocks", "6 blocks", "smollm2-135m", "5,760 latents, 64 active"} <= set(linear)
    assert "linear" in linear
    assert "2 blocks" in texts(architecture_plot(SIZES))
