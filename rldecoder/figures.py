"""Figures that stages publish: SVG with the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure


@contextmanager
def svg_figure(path: Path, size: tuple[float, float], *, font_size: float = 9) -> Iterator[Figure]:
    """A figure to draw on, `size` in inches, saved when the block is left without an error."""
    # matplotlib otherwise names clip paths by a random salt and stamps the date.
    with mpl.rc_context({"svg.hashsalt": "rldecoder", "font.size": font_size}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(path, format="svg", metadata={"Date": None})
