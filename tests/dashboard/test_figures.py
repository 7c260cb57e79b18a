"""Figures: the same bytes every time, no dates, and edge cases that still draw."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from rldecoder.dashboard.architecture import Sizes, architecture_plot
from rldecoder.dashboard.build_figures import frontier_lines, stage_boundaries
from rldecoder.dashboard.figures import (
    PALETTE,
    Dot,
    Drawing,
    Line,
    density_plot,
    interval_plot,
    line_plot,
    reliability_plot,
)
from rldecoder.decoder.frontier import FrontierCell

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


def strokes(drawn: Drawing) -> list[tuple[str, str]]:
    """Colour and dashes of every line of a plot, in the order of drawing; no axes, no legend."""
    found = []
    for group in ET.fromstring(drawn.svg).iter():
        if group.get("id", "").startswith("line2d"):
            for path in group:
                style = dict(
                    part.split(": ") for part in path.get("style", "").split("; ") if ": " in part
                )
                if path.tag.endswith("path") and style.get("stroke") in PALETTE:
                    found.append((style["stroke"], style.get("stroke-dasharray", "solid")))
    return found


def test_lines_past_the_palette_differ_in_style() -> None:
    lines = [Line(str(n), [0, 1], [n, n]) for n in range(2 * len(PALETTE))]
    drawn = strokes(line_plot(lines, x_label="x", y_label="y"))
    assert len(set(drawn)) == len(lines)


def frontier_cells(layers: int, ks: int) -> list[FrontierCell]:
    return [
        FrontierCell.model_construct(
            layer=layer, k=k, sae=sae, depth=depth, kl=layer + k + depth, splice_kl=0.1
        )
        for layer in range(layers) for k in range(ks)
        for sae, depth in (("trained", 0), ("trained", 2), ("random", 2))
    ]  # fmt: skip


def test_no_two_lines_of_the_frontier_look_alike() -> None:
    lines = frontier_lines(frontier_cells(layers=3, ks=2))
    assert len(lines) == 3 * 2 * 3
    assert len({line.name for line in lines}) == len(lines)
    assert len({(line.colour, line.style, line.marker) for line in lines}) == len(lines)
    drawn = [line for line in lines if line.style != "none"]
    assert len({(line.colour, line.style) for line in drawn}) == len(drawn) == 12
    crosses = [line for line in lines if line.name.endswith("random")]
    assert {line.style for line in crosses} == {"none"}
    assert {line.marker for line in crosses} == {"x", "+"}
    assert [line.y for line in crosses][:2] == [[2], [3]]  # the random SAEs' own rows
    svg = line_plot(lines, x_label="blocks", y_label="KL")
    # Every line is drawn in the plot and once more in the legend.
    assert set(strokes(svg)) >= set(strokes(line_plot(drawn, x_label="b", y_label="KL")))
    assert len(set(strokes(svg))) == 12


def test_stage_boundaries_are_where_weights_changed() -> None:
    stages = [20, 30, 50]
    curves = {"eval_kl": ([0, 100], [1.0, 1.0])}
    assert stage_boundaries(stages, curves) == [20, 50]
    assert stage_boundaries(stages, {"eval_kl": ([0, 40], [1.0, 1.0])}) == [20]  # it stopped early
    assert stage_boundaries(stages[:1], curves) == stage_boundaries(stages, {}) == []
    drawn = line_plot(
        [Line("a", [0, 100], [1, 2])], x_label="x", y_label="y", boundaries=[20, 50],
        boundary_name="other reward weights",
    )  # fmt: skip
    assert texts(drawn).count("other reward weights") == 1


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
