"""Figures of the report: SVG and PDF, the same on every run, readable in light and dark.

Text stays text (`svg.fonttype: none`), so that the page's own font and colour apply; PDF embeds
its fonts. Functions take plain values and return a `Drawing`; the caller decides where it goes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PALETTE = ("#3b6fd4", "#d9762b", "#24936a", "#ad4f8f", "#8a8f98", "#7a6ad8")
# Middle grey reads on white and on near-black.
FRAME = "#8b909a"
STYLE: Any = {
    "svg.hashsalt": "rldecoder",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a model may be called `my$^$model`
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": FRAME,
    "axes.labelcolor": FRAME,
    "axes.edgecolor": FRAME,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE),
    "xtick.color": FRAME,
    "ytick.color": FRAME,
    "grid.color": FRAME,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
SIZE = (5.2, 2.9)
FAR = 2.5
ROUNDS = ("-", "-.", ":")
"""Styles of lines that come after the palette was used up once, and twice."""


Style: TypeAlias = str | tuple[float, tuple[float, ...]]
"""A line's style as matplotlib has it: a name, or an offset and the lengths of dashes and gaps."""


class Drawing(NamedTuple):
    """A figure, for the page and for papers."""

    svg: str
    """An `<svg>` element, without XML header, date and fixed size."""
    pdf: bytes
    """One page with embedded fonts."""


class Line(NamedTuple):
    """One line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    colour: str | None = None
    """None takes the next of the palette."""
    style: Style | None = None
    """As matplotlib has it, `none` for markers alone; None follows `dashed`."""
    marker: str | None = None
    """None draws dots where the plot asks for markers."""


class Dot(NamedTuple):
    """A value with its interval, drawn as a dot with whiskers."""

    name: str
    value: float
    low: float
    high: float


def line_plot(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    target: float | None = None,
    markers: bool = False,
    boundaries: Sequence[float] = (),
    boundary_name: str = "",
) -> Drawing:
    """Lines over a common axis; their names are below, where they cover nothing.

    Args:
        target: a dotted line, unless it is far off the data.
        boundaries: where vertical lines go; the legend says `boundary_name` for all of them.
    """
    highest = max((max(line.y) for line in lines if len(line.y)), default=0.0)
    if target is not None and target > FAR * highest:
        target = None
    names = len(lines) + (target is not None) + bool(boundaries)
    # Three of the usual names fit beside each other, but not three long ones.
    longest = max(
        (len(name) for name in (*(line.name for line in lines), boundary_name)), default=0
    )
    columns = 3 if longest <= 20 else 2
    size = (SIZE[0], SIZE[1] + 0.22 * -(-names // columns)) if names > 1 else SIZE
    with _figure(size, outside=names > 1) as (figure, axes):
        for place in boundaries:
            name = boundary_name if place == boundaries[0] else "_"  # matplotlib hides those
            axes.axvline(place, color=FRAME, linewidth=0.8, label=name, alpha=0.7)
        for index, line in enumerate(lines):
            _draw_line(axes, line, index, markers)
        if target is not None:
            axes.axhline(
                target, color=FRAME, linestyle=":", linewidth=1.2, label=f"plan {target:g}"
            )
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if names > 1:
            # Long enough that a dash shows beside the dot.
            figure.legend(loc="outside lower center", ncols=columns, handlelength=3.2)
        return drawing(figure)


def _draw_line(axes: Axes, line: Line, index: int, markers: bool) -> None:
    turn = ROUNDS[index // len(PALETTE) % len(ROUNDS)]
    dots = "o" if markers or len(line.x) == 1 else None
    axes.plot(
        line.x,
        line.y,
        label=line.name,
        color=line.colour or PALETTE[index % len(PALETTE)],
        linestyle=line.style or ("--" if line.dashed else turn),
        marker=line.marker or dots,
        markersize=3.5 if line.marker is None else 5.5,
    )


def density_plot(density: Sequence[float]) -> Drawing:
    """Histogram of log10 firing density; dead latents are named in the legend."""
    values = np.asarray(density, dtype=np.float64)
    alive = values[values > 0]
    with _figure() as (figure, axes):
        axes.hist(
            np.log10(alive) if alive.size else [],
            bins=48,
            range=(-6, 0),
            color=PALETTE[0],
            alpha=0.85,
            label=f"{values.size - alive.size:,} of {values.size:,} latents never fire",
        )
        axes.grid(axis="y")
        axes.set_xlabel("log10 of the share of tokens on which a latent fires")
        axes.set_ylabel("latents")
        axes.legend(loc="upper left", handlelength=0)
        return drawing(figure)


def interval_plot(
    groups: Mapping[str, Sequence[Dot]], *, x_label: str, target: float | None = None
) -> Drawing:
    """Dots with whiskers, one row a name, one colour a group."""
    names = list(dict.fromkeys(dot.name for dots in groups.values() for dot in dots))
    height = max(1.6, 0.34 * len(names) * max(1, len(groups) * 0.6) + 0.9)

    with _figure((SIZE[0], height), outside=True) as (figure, axes):
        offsets = np.linspace(-0.22, 0.22, len(groups)) if len(groups) > 1 else [0.0]
        for index, (group, dots) in enumerate(groups.items()):
            y = [names.index(dot.name) + float(offsets[index]) for dot in dots]
            value = np.array([dot.value for dot in dots])
            error = np.array([[dot.value - dot.low, dot.high - dot.value] for dot in dots]).T
            axes.errorbar(
                value,
                y,
                xerr=np.maximum(error, 0) if len(dots) else None,
                fmt="o",
                markersize=5,
                linewidth=1.6,
                color=PALETTE[index % len(PALETTE)],
                label=group,
            )

        if target is not None:
            axes.axvline(
                target, color=FRAME, linestyle=":", linewidth=1.2, label=f"plan {target:g}"
            )

        # From top to bottom, as they were given.
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.set_xlabel(x_label)
        if len(groups) > 1 or target is not None:
            figure.legend(loc="outside upper right", ncols=4)
        return drawing(figure)


def reliability_plot(bins: Sequence[tuple[int, float, float]]) -> Drawing:
    """Claimed confidence against the share that was right; the area shows the bin's size.

    Args:
        bins: how many, their mean confidence, and the share that was right.
    """
    with _figure() as (figure, axes):
        axes.plot([0, 1], [0, 1], color=FRAME, linestyle=":", linewidth=1.2)
        if bins:
            sizes, stated, right = zip(*bins, strict=True)
            axes.scatter(
                stated,
                right,
                s=[20 + 160 * size / max(sizes) for size in sizes],
                color=PALETTE[0],
                alpha=0.8,
                linewidths=0,
            )
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        axes.grid()
        axes.set_xlabel("stated confidence")
        axes.set_ylabel("accepted on test text")
        return drawing(figure)


@contextmanager
def _figure(
    size: tuple[float, float] = SIZE, *, outside: bool = False
) -> Iterator[tuple[Figure, Axes]]:
    # Constrained layout doubles the drawing time; it is for what lies outside of the axes.
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained" if outside else None)
        if not outside:
            figure.subplots_adjust(left=0.13, right=0.98, bottom=0.16, top=0.96)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield figure, axes


def drawing(figure: Figure) -> Drawing:
    """A finished figure in both formats, the same bytes on every run."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    pages = io.BytesIO()
    figure.savefig(pages, format="pdf", metadata={"CreationDate": None, "Creator": None})
    return Drawing(text[text.index("<svg") :].strip(), pages.getvalue())
