"""SAEDashboard's batch JSON: `batch-<n>.json`, as its `NeuronpediaRunner` writes it.

Format: `sae_dashboard.neuronpedia.neuronpedia_dashboard` of sae-dashboard 0.8.0. What this run
has not measured (correlated neurons and features, attention weights) stays empty, as SAEDashboard
leaves it when switched off. A failed latent has its activations, for people to look at.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from rldecoder.interp.exports.material import Activation, ExportFeature, ExportMaterial, Profile
from rldecoder.schemas import write_json

FEATURES_PER_BATCH = 128


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


def _feature(feature: ExportFeature, material: ExportMaterial) -> Feature:
    return Feature(
        **dict(feature.profile),
        feature_index=feature.record.latent,
        n_prompts_total=material.num_sequences,
        n_tokens_in_prompt=material.context_length,
        dataset=material.dataset,
        activations=feature.activations,
    )
