"""What explanations need to know of latents: their labels and their importance."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from rldecoder.interp.records import FeatureLabels
from rldecoder.interp.shown import Shown, ShownLatents


class LabelText(NamedTuple):
    """What is known about a latent in words."""

    text: str | None
    """None when the labeler abstained or failed."""
    confidence: float | None
    """Calibrated probability that a person accepts the label; None when unknown."""
    accepted: bool = False
    """Of high confidence, or accepted by a person: only such a label may be quoted as what is
    known of the latent."""
    description: str | None = None
    """What is known of a latent without a label that may be quoted, such as the tokens that it
    raises; to be shown as no label."""

    @property
    def quoted(self) -> str | None:
        """The text where it may be quoted."""
        return self.text if self.accepted else None

    @property
    def unsure(self) -> str | None:
        """The text of a label that is below the bar: shown as a guess, or not at all."""
        return None if self.accepted else self.text


def label_texts(
    labels: FeatureLabels, descriptions: pa.Table | None = None
) -> dict[int, LabelText]:
    """What is said of latents, by latent: see `interp.shown`.

    Args:
        descriptions: of the latents that were not to be labelled; None: an older program wrote
            none.
    """
    said = ShownLatents(labels, descriptions)
    return {latent: _label_text(said.of(latent)) for latent in said.latents}


def _label_text(said: Shown) -> LabelText:
    if said.is_label:
        return LabelText(said.text, said.confidence, said.sure)
    return LabelText(None, None, description=said.text)


def mean_importance(
    table: pa.Table, num_latents: int, target: str = "decoder"
) -> Float[Tensor, " latents"]:
    """Mean |importance| of each latent over the domains, nats a position: float32 [L].

    A latent without a row never fired and counts 0.

    Args:
        table: with the columns of `rldecoder.interp.tally.IMPORTANCE`.
        target: whose prediction the importance is about, `decoder` or `frozen`.
    """
    wanted = np.asarray(table["target"]) == target
    value = np.asarray(table["importance"], dtype=np.float64)[wanted]
    domains = len(np.unique(np.asarray(table["domain"])[wanted]))
    total = np.bincount(np.asarray(table["latent"])[wanted], weights=value, minlength=num_latents)
    return torch.from_numpy((total / max(domains, 1)).astype(np.float32))
