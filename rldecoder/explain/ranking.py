"""Method A: which features are active, strongest first. It reports activity, never causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from rldecoder.explain.inputs import LabelText
from rldecoder.interp.corpus import Firings
from rldecoder.interp.shown import UNKNOWN
from rldecoder.interp.strong import usual_highs
from rldecoder.visible_text import visible_text


@dataclass(frozen=True)
class RankedFeature:
    """One active feature of Method A."""

    latent: int
    """Its number in the dictionary."""
    act: float
    """Its activation."""
    normalised: float
    """Activation over the latent's usual high (p99 on the label split); 0 if never seen."""
    label: str | None
    """None where there is none that may be quoted."""
    confidence: float | None
    """Of the label, quoted or not."""
    unsure_label: str | None = None
    """A label below the bar of confidence: a guess, to be shown as one."""
    description: str | None = None
    """What is known of a latent without a label that may be quoted."""

    @property
    def quoted(self) -> bool:
        """Whether the label may be quoted as what is known of the latent."""
        return self.label is not None


def activation_scales(
    indices: Int[Tensor, " *axes"], acts: Float[Tensor, " *axes"], num_latents: int
) -> Float[Tensor, " latents"]:
    """Each latent's usual high (`usual_highs`).

    Args:
        indices, acts: any equal shape; entries with act 0 are padding.

    Returns: float32 [L]; 0 for latents that never fired.
    """
    fired = (acts > 0).flatten()
    latent = indices.flatten()[fired].cpu().numpy()
    value = acts.flatten()[fired].float().cpu().numpy()
    shape = (num_latents, len(value))
    matrix = sparse.csr_array((value, (latent, np.arange(len(value)))), shape=shape)
    highs = usual_highs(Firings(np.arange(num_latents), matrix))
    return torch.from_numpy(np.where(np.isfinite(highs), highs, 0.0).astype(np.float32))


def rank_active(
    acts: Float[Tensor, " active"],
    indices: Int[Tensor, " active"],
    scales: Float[Tensor, " latents"],
    labels: Mapping[int, LabelText],
    top: int = 5,
) -> list[RankedFeature]:
    """The `top` active features of one position, by normalised activation.

    Args:
        acts, indices: [K], one position's latents; act 0 is padding.
        scales: [L] from `activation_scales`.
        labels: by latent; latents without an entry count as unlabelled.

    Ties go to the lower latent number, so the same input always gives the same text.
    """
    ranked: list[RankedFeature] = []
    for act, latent in zip(acts.tolist(), indices.tolist(), strict=True):
        if act <= 0:
            continue
        scale = float(scales[latent])
        label = labels.get(latent, LabelText(None, None))
        ranked.append(
            RankedFeature(
                latent,
                act,
                act / scale if scale > 0 else 0.0,
                label.quoted,
                label.confidence,
                label.unsure,
                None if label.quoted is not None else label.description,
            )
        )
    ranked.sort(key=lambda feature: (-feature.normalised, feature.latent))
    return ranked[:top]


def ranking_text(ranked: Sequence[RankedFeature]) -> str:
    """Method A's words: a short table of what is active, and how strongly; it draws no conclusion.

    A label below the bar of confidence is not quoted.
    """
    if not ranked:
        return "No feature is active at this position."
    rows = [("feature", "of its usual high", ""), *ranking_rows(ranked)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [
        f"{feature:<{widths[0]}}  {high:<{widths[1]}}  {what}".rstrip()
        for feature, high, what in rows
    ]
    return "\n".join(["Active at this position, strongest first:", *lines])


def ranking_rows(ranked: Sequence[RankedFeature]) -> list[tuple[str, str, str]]:
    """Method A's table: the feature, its activation over its usual high, and what it is."""
    rows = []
    for feature in ranked:
        what = visible_text(feature.description or UNKNOWN.text, 160)
        if feature.label is not None:
            what = f"“{visible_text(feature.label, 120)}”"
        high = f"{feature.normalised:.2f}" if feature.normalised > 0 else "first seen"
        rows.append((f"#{feature.latent}", high, what))
    return rows
