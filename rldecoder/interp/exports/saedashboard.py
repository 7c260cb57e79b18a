"""SAEDashboard's batch JSON: `batch-<n>.json`, as its `NeuronpediaRunner` writes it.

Format: `sae_dashboard.neuronpedia.neuronpedia_dashboard` of sae-dashboard 0.8.0. What this run
has not measured (correlated neurons and features, attention weights) stays empty, as SAEDashboard
leaves it when switched off. A failed latent has its activations, for people to look at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rldecoder.interp.exports.material import ExportExample, ExportFeature, ExportMaterial
from rldecoder.schemas import write_json

FEATURES_PER_BATCH = 128


def write(folder: Path, material: ExportMaterial, model_id: str, source_set: str) -> list[Path]:
    """Write the batches into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, batch in enumerate(batches(material, model_id, source_set)):
        paths.append(folder / f"batch-{number}.json")
        write_json(paths[-1], batch)
    return paths


def batches(material: ExportMaterial, model_id: str, source_set: str) -> list[dict[str, Any]]:
    """The content of each file, FEATURES_PER_BATCH latents in each, in the order of their ids.

    Args:
        model_id: the model's name in the viewer.
        source_set: the viewer's name for this SAE, without the layer.
    """
    features = sorted(material.features, key=lambda feature: feature.record.latent)
    return [
        {
            "model_id": model_id,
            "layer": material.layer,
            "sae_set": source_set,
            "sae_id_suffix": None,
            "features": [
                _feature(feature, material)
                for feature in features[start : start + FEATURES_PER_BATCH]
            ],
        }
        for start in range(0, len(features), FEATURES_PER_BATCH)
    ]


def _feature(feature: ExportFeature, material: ExportMaterial) -> dict[str, Any]:
    record = feature.record
    return {
        "feature_index": record.latent,
        "neuron_alignment_indices": feature.neurons.indices,
        "neuron_alignment_values": _short(feature.neurons.values),
        "neuron_alignment_l1": _short(feature.neurons.shares),
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": [effect.token for effect in record.suppressed],
        "neg_values": _short([effect.effect for effect in record.suppressed]),
        "pos_str": [effect.token for effect in record.promoted],
        "pos_values": _short([effect.effect for effect in record.promoted]),
        "frac_nonzero": record.density,
        "freq_hist_data_bar_values": _short(feature.acts.centers),
        "freq_hist_data_bar_heights": feature.acts.counts,
        "logits_hist_data_bar_heights": feature.logits.counts,
        "logits_hist_data_bar_values": _short(feature.logits.centers),
        "n_prompts_total": material.num_sequences,
        "n_tokens_in_prompt": material.context_length,
        "dataset": material.dataset,
        "decoder_weights_dist": [],
        "activations": [_activation(example) for example in feature.examples],
        "vector": [],
    }


def _activation(example: ExportExample) -> dict[str, Any]:
    return {
        "bin_min": example.low,
        "bin_max": example.high,
        "bin_contains": example.contains,
        "tokens": example.tokens,
        "values": _short(example.acts),
        "qualifying_token_index": example.focus,
    }


def _short(values: list[float]) -> list[float]:
    """Four significant digits: activations of some SAEs are far below 1."""
    return [float(f"{value:.4g}") for value in values]
