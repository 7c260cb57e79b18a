"""SAEDashboard's batch JSON: `batch-<n>.json`, as its `NeuronpediaRunner` writes it.

Format: `sae_dashboard.neuronpedia.neuronpedia_dashboard` of sae-dashboard 0.8.0. What this run
has not measured (correlated neurons and features, attention weights) stays empty, as SAEDashboard
leaves it when switched off. A failed latent has its activations, for people to look at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel

from rldecoder.interp.exports.material import ExportExample, ExportFeature, ExportMaterial
from rldecoder.schemas import write_json

FEATURES_PER_BATCH = 128

Short = Annotated[float, AfterValidator(lambda value: float(f"{value:.4g}"))]
"""Four significant digits: activations of some SAEs are far below 1."""


class Activation(BaseModel):
    """A window of text."""

    bin_min: float
    bin_max: float
    bin_contains: float
    tokens: list[str]
    values: list[Short]
    qualifying_token_index: int


class Profile(BaseModel):
    """A feature without its text."""

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


class Feature(Profile):
    """A feature with the text that it fires on."""

    feature_index: int
    n_prompts_total: int
    n_tokens_in_prompt: int
    dataset: str
    activations: list[Activation]


class Batch(BaseModel):
    """One file."""

    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str | None = None
    features: list[Feature]


def write(folder: Path, material: ExportMaterial, model_id: str, source_set: str) -> list[Path]:
    """Write the batches into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, features in enumerate(batches(material)):
        batch = Batch(
            model_id=model_id,
            layer=material.layer,
            sae_set=source_set,
            features=[_feature(feature, material) for feature in features],
        )
        paths.append(folder / f"batch-{number}.json")
        write_json(paths[-1], batch.model_dump())
    return paths


def batches(material: ExportMaterial) -> list[list[ExportFeature]]:
    """The features of each file, FEATURES_PER_BATCH in each, in the order of their ids."""
    features = sorted(material.features, key=lambda feature: feature.record.latent)
    starts = range(0, len(features), FEATURES_PER_BATCH)
    return [features[start : start + FEATURES_PER_BATCH] for start in starts]


def profile(feature: ExportFeature) -> Profile:
    """What is known of a feature beside its text."""
    record = feature.record
    return Profile(
        neuron_alignment_indices=feature.neurons.indices,
        neuron_alignment_values=feature.neurons.values,
        neuron_alignment_l1=feature.neurons.shares,
        neg_str=[effect.token for effect in record.suppressed],
        neg_values=[effect.effect for effect in record.suppressed],
        pos_str=[effect.token for effect in record.promoted],
        pos_values=[effect.effect for effect in record.promoted],
        frac_nonzero=record.density,
        freq_hist_data_bar_values=feature.acts.centers,
        freq_hist_data_bar_heights=feature.acts.counts,
        logits_hist_data_bar_heights=feature.logits.counts,
        logits_hist_data_bar_values=feature.logits.centers,
    )


def activation(example: ExportExample) -> Activation:
    """A window of text in which a feature fires."""
    return Activation(
        bin_min=example.low,
        bin_max=example.high,
        bin_contains=example.contains,
        tokens=example.tokens,
        values=example.acts,
        qualifying_token_index=example.focus,
    )


def _feature(feature: ExportFeature, material: ExportMaterial) -> Feature:
    return Feature(
        **dict(profile(feature)),
        feature_index=feature.record.latent,
        n_prompts_total=material.num_sequences,
        n_tokens_in_prompt=material.context_length,
        dataset=material.dataset,
        activations=[activation(example) for example in feature.examples],
    )
