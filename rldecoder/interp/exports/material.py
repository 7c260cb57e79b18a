"""What every viewer of features wants to know, gathered once from a run's artifacts.

All of it is measured on the `label` split, which the labels were made from. Tokens are raw text:
who shows them must escape them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import DamagedFileError
from rldecoder.interp.corpus import SplitFirings
from rldecoder.interp.records import FeatureLabel, FeatureLabels
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.json_records import Row
from rldecoder.sae.model import Sae

NUM_BARS = 40
NUM_INTERVALS = 10
NUM_NEURONS = 3


class ExportExample(NamedTuple):
    """A window of text in which the latent fires."""

    kind: str
    """`top` or `quantile`."""
    tokens: list[str]
    acts: list[float]
    """Activations of the tokens, in the SAE's units."""
    focus: int
    """Index of the token that the example was chosen for."""
    low: float
    """The interval of activations that the example stands for; a top example's is [-1, max]."""
    high: float
    contains: float
    """Share of all tokens whose activation lies in it; -1 for a top example."""


class Histogram(NamedTuple):
    """Bars of equal width."""

    centers: list[float]
    counts: list[int]


class Neurons(NamedTuple):
    """Dimensions of the residual stream where the latent's decoder row is largest."""

    indices: list[int]
    values: list[float]
    shares: list[float]
    """|value| over the row's L1 norm."""


class ExportFeature(NamedTuple):
    """One labelled latent."""

    record: FeatureLabel
    examples: list[ExportExample]
    acts: Histogram
    """Of the activations above 0."""
    logits: Histogram
    """Of what a unit of activation does to each token's logit."""
    neurons: Neurons


class ExportMaterial(NamedTuple):
    """Features of one run, most important first."""

    model_name: str
    hook_name: str
    """In TransformerLens words: `blocks.23.hook_resid_post`."""
    layer: int
    """The block number in `hook_name`."""
    num_latents: int
    num_sequences: int
    context_length: int
    dataset: str
    """What the text is, in words."""
    features: list[ExportFeature]


def gather(
    labels: FeatureLabels,
    examples: pa.Table,
    split: SplitFirings,
    sae: Sae,
    decoder: SaeDecoderForCausalLM,
    vocabulary: Vocabulary,
    dataset: str,
) -> ExportMaterial:
    """Everything that viewers show, for each labelled latent.

    Args:
        split: firings of exactly these latents, in the order of `labels`, on the `label` split.
        dataset: what the text is, in words.

    Raises:
        DamagedFileError: examples and labels belong to different runs.
    """
    wanted = [feature.latent for feature in labels.features]
    rows: dict[int, list[Row]] = {latent: [] for latent in wanted}
    for row in examples.to_pylist():
        if row["latent"] not in rows:
            raise DamagedFileError(
                f"examples.parquet shows latent {row['latent']}, which has no label.",
                "The files belong to different runs.",
                "Rebuild the labels.",
            )
        if row["kind"] in ("top", "quantile"):
            rows[row["latent"]].append(row)

    # A decoder with blocks has no single logit effect: the row's own way past them is shown.
    unembedding = decoder.frozen.lm.unembedding.detach().float()
    directions = decoder.direct(torch.tensor(wanted)).detach().float()
    features = [
        ExportFeature(
            record,
            _examples(rows[record.latent], split, index, vocabulary),
            _histogram(split.firings.row(index)[1]),
            _histogram((directions[index] @ unembedding.T).cpu().numpy()),
            _neurons(sae.W_dec[record.latent]),
        )
        for index, record in enumerate(labels.features)
    ]
    hook = sae.spec.hook_name
    return ExportMaterial(
        labels.model_name, hook, int(hook.split(".")[1]), labels.num_latents,
        int(split.grid.tokens.shape[0]), split.grid.num_positions, dataset, features,
    )  # fmt: skip


def _examples(
    rows: list[Row], split: SplitFirings, index: int, vocabulary: Vocabulary
) -> list[ExportExample]:
    """A latent's examples; each of the quantile ones with the interval its activation lies in."""
    acts = split.firings.row(index)[1]
    top = float(acts.max()) if acts.size else 0.0
    bounds = np.linspace(0, top, NUM_INTERVALS + 1)
    # Intervals (a, b], so that silence is in none of them.
    share = np.histogram(-acts, -bounds[::-1])[0][::-1] / split.grid.cells.size
    out = []
    for row in rows:
        place = int(np.clip(np.searchsorted(bounds, row["act"]) - 1, 0, NUM_INTERVALS - 1))
        interval = (float(bounds[place]), float(bounds[place + 1]), float(share[place]))
        low, high, contains = (-1.0, top, -1.0) if row["kind"] == "top" else interval
        out.append(
            ExportExample(
                row["kind"],
                [vocabulary.texts[token] if token >= 0 else "" for token in row["tokens"]],
                [float(act) for act in row["acts"]],
                row["pos"] - row["start"],
                low,
                high,
                contains,
            )
        )
    return out


def _histogram(values: NDArray[np.float32]) -> Histogram:
    if not values.size:
        return Histogram([], [])
    counts, edges = np.histogram(values, NUM_BARS)
    return Histogram(((edges[1:] + edges[:-1]) / 2).tolist(), counts.tolist())


def _neurons(row: torch.Tensor) -> Neurons:
    values, indices = row.detach().float().cpu().topk(min(NUM_NEURONS, row.numel()))
    norm = max(float(row.detach().float().abs().sum()), 1e-12)
    return Neurons(indices.tolist(), values.tolist(), (values.abs() / norm).tolist())
