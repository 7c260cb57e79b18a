"""What every viewer of features wants to know, gathered once from a run's artifacts.

All of it is measured on the `label` split, which the labels were made from. Tokens are raw text:
who shows them must escape them.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel

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


Short = Annotated[float, AfterValidator(lambda value: float(f"{value:.4g}"))]
"""Four significant digits: activations of some SAEs are far below 1."""


class Activation(BaseModel):
    """A window of text in which the latent fires, in SAEDashboard's words."""

    bin_min: float
    """The interval of activations that the window stands for; a top example's is [-1, max]."""
    bin_max: float
    bin_contains: float
    """Share of all tokens whose activation lies in it; -1 for a top example."""
    tokens: list[str]
    values: list[Short]
    """Activations of the tokens, in the SAE's units."""
    qualifying_token_index: int
    """The token that the window was chosen for."""


class Profile(BaseModel):
    """A feature without its text, in SAEDashboard's words.

    Neurons are the dimensions of the residual stream where the latent's decoder row is largest
    (`l1`: |value| over the row's L1 norm). Histograms are of the activations above 0, and of what a
    unit of activation does to each token's logit.
    """

    neuron_alignment_indices: list[int]
    neuron_alignment_values: list[Short]
    neuron_alignment_l1: list[Short]
    correlated_neurons_indices: list[int] = []
    correlated_neurons_l1: list[float] = []
    correlated_neurons_pearson: list[float] = []
    correlated_features_indices: list[int] = []
    correlated_features_l1: list[float] = []
    correlated_features_pearson: list[float] = []
    neg_str: list[str]
    neg_values: list[Short]
    pos_str: list[str]
    pos_values: list[Short]
    frac_nonzero: float
    freq_hist_data_bar_values: list[Short]
    freq_hist_data_bar_heights: list[int]
    logits_hist_data_bar_heights: list[int]
    logits_hist_data_bar_values: list[Short]
    decoder_weights_dist: list[float] = []
    vector: list[float] = []


class ExportFeature(NamedTuple):
    """One labelled latent."""

    record: FeatureLabel
    profile: Profile
    activations: list[Activation]


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
            _profile(
                record,
                split.firings.row(index)[1],
                (directions[index] @ unembedding.T).cpu().numpy(),
                sae.W_dec[record.latent].detach().float().cpu(),
            ),
            _activations(rows[record.latent], split, index, vocabulary),
        )
        for index, record in enumerate(labels.features)
    ]
    hook = sae.spec.hook_name
    return ExportMaterial(
        labels.model_name, hook, int(hook.split(".")[1]), labels.num_latents,
        int(split.grid.tokens.shape[0]), split.grid.num_positions, dataset, features,
    )  # fmt: skip


def _activations(
    rows: list[Row], split: SplitFirings, index: int, vocabulary: Vocabulary
) -> list[Activation]:
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
            Activation(
                bin_min=low,
                bin_max=high,
                bin_contains=contains,
                tokens=[vocabulary.texts[token] if token >= 0 else "" for token in row["tokens"]],
                values=row["acts"],
                qualifying_token_index=row["pos"] - row["start"],
            )
        )
    return out


def _profile(
    record: FeatureLabel,
    acts: NDArray[np.float32],
    effects: NDArray[np.float32],
    direction: torch.Tensor,
) -> Profile:
    values, indices = direction.topk(min(NUM_NEURONS, direction.numel()))
    norm = max(float(direction.abs().sum()), 1e-12)
    (act_values, act_heights), (logit_values, logit_heights) = map(_histogram, (acts, effects))
    return Profile(
        neuron_alignment_indices=indices.tolist(),
        neuron_alignment_values=values.tolist(),
        neuron_alignment_l1=(values.abs() / norm).tolist(),
        neg_str=[effect.token for effect in record.suppressed],
        neg_values=[effect.effect for effect in record.suppressed],
        pos_str=[effect.token for effect in record.promoted],
        pos_values=[effect.effect for effect in record.promoted],
        frac_nonzero=record.density,
        freq_hist_data_bar_values=act_values,
        freq_hist_data_bar_heights=act_heights,
        logits_hist_data_bar_heights=logit_heights,
        logits_hist_data_bar_values=logit_values,
    )


def _histogram(values: NDArray[np.float32]) -> tuple[list[float], list[int]]:
    """Centers and heights of bars of equal width."""
    if not values.size:
        return [], []
    counts, edges = np.histogram(values, NUM_BARS)
    return ((edges[1:] + edges[:-1]) / 2).tolist(), counts.tolist()
