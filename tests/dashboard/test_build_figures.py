"""From artifacts to figures: lines that can be told apart, and where weights changed."""

from __future__ import annotations

from rldecoder.dashboard.build_figures import frontier_lines, stage_boundaries
from rldecoder.dashboard.figures import (
    Line,
    line_plot,
)
from rldecoder.decoder.frontier import FrontierCell
from tests.dashboard.drawn import strokes, texts


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
