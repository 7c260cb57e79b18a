"""Figures of the QA gate, as SVG that is the same on every run."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from rldecoder.figures import svg_figure


def density_histogram(
    density: Float[Tensor, " latents"], control: Float[Tensor, " latents"] | None, path: Path
) -> None:
    """Histogram of log10 firing density; dead latents are counted in the legend.

    Args:
        density: [L] share of tokens on which each latent fires.
        control: the same of the random-init SAE, or None.
    """
    with svg_figure(path, (5.2, 3.0)) as figure:
        axes = figure.add_subplot()
        series = [("trained", density, "#1f6f8b")]
        if control is not None:
            series.append(("random init, same L0", control, "#b0b0b0"))
        for name, values, colour in series:
            alive = values[values > 0].log10().numpy()
            dead = int((values == 0).sum())
            axes.hist(
                alive,
                bins=60,
                range=(-6, 0),
                histtype="step",
                color=colour,
                label=f"{name} ({dead} of {len(values)} never fire)",
            )
        axes.set_xlabel("log10 of the share of tokens on which a latent fires")
        axes.set_ylabel("latents")
        axes.legend(frameon=False, loc="upper left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
