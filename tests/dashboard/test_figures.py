"""Figures: the same bytes every time, no dates, and edge cases that still draw."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from rldecoder.dashboard.figures import (
    Bar,
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
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_same_bytes_and_plain_svg(name: str) -> None:
    svg = DRAWINGS[name]()
    assert svg == DRAWINGS[name]()
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "date" not in svg.lower()
    assert not any(node.tag.endswith(("script", "foreignObject")) for node in root.iter())


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ET.fromstring(svg).iter() if node.tag.endswith("}text")]


def test_text_stays_text_and_is_escaped() -> None:
    svg = line_plot([Line("a<b>&", [0, 1], [1, 2])] * 2, x_label="x & y", y_label="z")
    assert "a<b>&" in texts(svg)
    assert "x & y" in texts(svg)


def test_a_target_far_off_the_data_does_not_flatten_it() -> None:
    near = line_plot([Line("a", [0, 1], [1.0, 0.9])], x_label="x", y_label="y", target=1.5)
    far = line_plot([Line("a", [0, 1], [0.1, 0.2])], x_label="x", y_label="y", target=1.5)
    assert "plan 1.5" in texts(near)
    assert "plan 1.5" not in texts(far)


def test_dead_latents_are_counted() -> None:
    assert "2 of 3 latents never fire" in texts(density_plot([0.0, 0.0, 0.5]))
