"""The picture of what was trained on what: frozen model, SAE, decoder, with this run's sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from rldecoder.dashboard.figures import FRAME, PALETTE, STYLE, Drawing, drawing

WIDTH, HEIGHT = 2.05, 0.92
UPPER, LOWER = 2.0, 0.0
SIZE = (9.2, 3.1)


class Sizes(NamedTuple):
    """What the boxes say."""

    model: str
    hook_layer: int
    num_layers: int
    d_model: int
    num_latents: int
    active: str
    """Active latents a token, such as "64"."""
    depth: int
    """Blocks of the decoder; 0 is linear."""


def architecture_plot(sizes: Sizes) -> Drawing:
    """Two ways from a text to the next token: through the frozen model, through its features."""
    below, above = sizes.hook_layer, sizes.num_layers - sizes.hook_layer
    decoder = "linear" if sizes.depth == 0 else f"{sizes.depth} blocks"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-1.15, 10.75)
        axes.set_ylim(-0.8, 3.0)

        _box(axes, 0.0, UPPER, "text", "tokens", None)
        _box(axes, 2.7, UPPER, f"{below} blocks", sizes.model, PALETTE[4])
        _box(axes, 6.5, UPPER, f"{above} blocks", "frozen", PALETTE[4])
        _box(axes, 9.5, UPPER, "next token", "frozen model", None)
        _box(axes, 4.4, LOWER, "SAE", f"{sizes.num_latents:,} latents, {sizes.active} active",
             PALETTE[0])  # fmt: skip
        _box(axes, 6.95, LOWER, "decoder", decoder, PALETTE[1])
        _box(axes, 9.5, LOWER, "next token", "decoder", None)

        half = WIDTH / 2
        _arrow(axes, (half, UPPER), (2.7 - half, UPPER))
        _arrow(axes, (2.7 + half, UPPER), (6.5 - half, UPPER))
        _arrow(axes, (6.5 + half, UPPER), (9.5 - half, UPPER))
        _arrow(axes, (4.4, UPPER), (4.4, LOWER + HEIGHT / 2))
        _arrow(axes, (4.4 + half, LOWER), (6.95 - half, LOWER))
        _arrow(axes, (6.95 + half, LOWER), (9.5 - half, LOWER))
        _arrow(axes, (9.5, UPPER - HEIGHT / 2), (9.5, LOWER + HEIGHT / 2), both=True)

        axes.text(4.6, UPPER + 0.1, f"residual stream,\n{sizes.d_model} wide", ha="center",
                  va="bottom", fontsize=8)  # fmt: skip
        axes.text(9.38, 1.0, "KL", ha="right", va="center", fontsize=8)
        return drawing(figure)


def _box(axes: Axes, x: float, y: float, name: str, more: str, colour: str | None) -> None:
    """A rounded box around two lines of text; None draws the outline only."""
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.14", "linewidth": 1.1}
    face = "none" if colour is None else (colour + "26")
    axes.add_patch(
        FancyBboxPatch(corner, WIDTH, HEIGHT, facecolor=face, edgecolor=colour or FRAME, **style)
    )
    axes.text(x, y + 0.14, name, ha="center", va="center", fontsize=10, fontweight="bold")
    axes.text(x, y - 0.2, more, ha="center", va="center", fontsize=7.2)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, both: bool = False
) -> None:
    shape = {"arrowstyle": "<->" if both else "->", "color": FRAME, "linewidth": 1.1,
             "shrinkA": 3, "shrinkB": 3}  # fmt: skip
    axes.annotate("", xy=end, xytext=start, arrowprops=shape)
