"""Figures: the same bytes every time, no dates, and edge cases that still draw."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from rldecoder.dashboard.architecture import Sizes, architecture_plot
from rldecoder.dashboard.figures import (
    PALETTE,
    Dot,
    Line,
    density_plot,
    interval_plot,
    line_plot,
    reliability_plot,
)
from tests.dashboard.drawn import SIZES, strokes, texts

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
        {"x": [Dot("one", 0.5, 0.4, 0.6), Dot("two", 0.1, 0.1, 0.1)], "y": []},
        x_label="score",
        target=0.3,
    ),
    "many lines": lambda: line_plot(
        [Line(str(n), [0, 1], [n, n]) for n in range(14)],
        x_label="x",
        y_label="y",
        boundaries=[0.5],
    ),
    "reliability": lambda: reliability_plot([(5, 0.3, 0.4)]),
    "no bins": lambda: reliability_plot([]),
    "architecture": lambda: architecture_plot(SIZES),
}


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


def test_lines_past_the_palette_differ_in_style() -> None:
    lines = [Line(str(n), [0, 1], [n, n]) for n in range(2 * len(PALETTE))]
    drawn = strokes(line_plot(lines, x_label="x", y_label="y"))
    assert len(set(drawn)) == len(lines)


def test_names_are_shown_as_they_are() -> None:
    name = "my$^$model $\\frac{$ _x"
    drawn = [
        line_plot(
            [Line(name, [0, 1], [0, 1]), Line("b", [0, 1], [1, 0])],
            x_label=name, y_label=name, boundaries=[0.5], boundary_name=name,
        ),
        interval_plot(
            {name: [Dot(name, 0.5, 0.4, 0.6)], "b": [Dot("b", 0.5, 0.4, 0.6)]},
            x_label=name,
        ),
        architecture_plot(Sizes(name, 2, 4, 64, 640, name, 0)),
    ]  # fmt: skip
    for drawing in drawn:
        texts = [element.text for element in ET.fromstring(drawing.svg).iter()]
        assert name in texts
