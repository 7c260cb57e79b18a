"""From artifacts to figures: lines that can be told apart, and where weights changed."""

from __future__ import annotations

import re

from rldecoder.dashboard.build_figures import ALL_TASKS, frontier_lines, stage_boundaries
from rldecoder.dashboard.control_figures import ARMS, COVERED, arms_figure, coverage_figure
from rldecoder.dashboard.figures import (
    Line,
    line_plot,
)
from rldecoder.decoder.frontier import FrontierCell
from rldecoder.evals.statistics import Measured
from rldecoder.interp.kinds import Coverages, KindCoverage
from tests.dashboard.drawn import strokes, texts


def frontier_cells(layers: int, ks: int, expansions: int = 1) -> list[FrontierCell]:
    return [
        FrontierCell.model_construct(
            layer=layer, k=k, expansion=float(4 + times), sae=sae, depth=depth,
            kl=layer + k + depth, splice_kl=0.1,
        )
        for layer in range(layers) for k in range(ks) for times in range(expansions)
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


def test_saes_of_several_sizes_have_lines_of_their_own() -> None:
    lines = frontier_lines(frontier_cells(layers=1, ks=1, expansions=2))
    assert [(line.name, line.x) for line in lines[:2]] == [
        ("layer 0, k 0, 4x", [0, 2]), ("layer 0, k 0, 5x", [0, 2])
    ]  # fmt: skip


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


def test_every_arm_and_control_has_a_name_of_its_own() -> None:
    rows = [
        {"system": name, "task": task, "score": 0.5, "score_low": 0.25, "score_high": 0.75,
         "num_prompts": 56}
        for name in (*reversed(ARMS), "unheard_of") for task in (ALL_TASKS, "kind")
    ]  # fmt: skip
    drawn = arms_figure(rows, ALL_TASKS)
    assert drawn is not None
    assert [text for text in texts(drawn.drawing) if text in ARMS.values()] == [*ARMS.values()]
    assert "56 test prompts" in drawn.caption
    assert arms_figure(rows[1:2], ALL_TASKS) is None


def test_coverage_stands_beside_its_controls() -> None:
    share, none = (
        Measured(value=0.5, low=0.25, high=0.75),
        Measured(value=None, low=None, high=None),
    )
    methods = {
        name: KindCoverage(
            latents=0 if name == "drawn" else 8, input=2, output=1, both=1, none=4,
            **dict.fromkeys(
                ("coverage", "input_coverage", "output_coverage"),
                none if name == "drawn" else share,
            ),
        )
        for name in COVERED if name != "shuffled"
    }  # fmt: skip
    drawn = coverage_figure(Coverages(methods=methods, gaps={}))
    assert drawn is not None
    shown = texts(drawn.drawing)
    # What was not measured has no row, as little as what the run had no control for.
    assert [text for text in shown if text in COVERED.values()] == [
        COVERED["label"], COVERED["random_sae"],
    ]  # fmt: skip
    assert {"either", "input", "output"} <= set(shown)
    assert coverage_figure(None) is None


def test_a_legend_of_long_names_stays_on_the_page() -> None:
    names = ["rollouts, sampled", "held-out prompts, greedy"]
    drawn = line_plot(
        [Line(name, [0, 1], [0, 1]) for name in names], x_label="x", y_label="y", boundaries=[0.5],
        boundary_name="other reward weights",
    )  # fmt: skip
    width = float(drawn.svg.split('viewBox="0 0 ')[1].split()[0])
    shown = re.findall(r'text-anchor: start[^>]* x="(-?[\d.]+)"[^>]*>([^<]+)<', drawn.svg)
    starts = {text: float(x) for x, text in shown}
    assert {*names, "other reward weights"} <= starts.keys()
    assert min(starts.values()) >= 0
    # A letter of the legend is some 5 points wide.
    assert all(x + 5 * len(text) < width for text, x in starts.items())
