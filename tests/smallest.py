"""Settings of a run that goes through every stage and has nearly nothing to do in each."""

from __future__ import annotations

import json
from typing import Any

_TOKENS = {"train": 4096, "validation": 512, "label": 1024, "test": 1024, "ood": 512}

SMALLEST: dict[str, dict[str, Any]] = {
    "ingest": {"context_length": 32, "budget_tokens": _TOKENS, "max_document_chars": 600},
    "baselines": {
        "lens_layers": [2], "fit_tokens": 2048, "validation_tokens": 512, "eval_tokens": 256,
        "num_task_prompts": 0, "ridge_strengths": [0.01],
    },
    "cache_activations": {"hook_layer": 2, "budget_tokens": _TOKENS},
    "train_sae": {
        "budget_tokens": 2048, "batch_tokens": 512, "init_tokens": 512, "warmup_steps": 1,
        "expansion": 4, "k": 8, "eval_every_steps": 2, "eval_tokens": 256,
        "dead_after_tokens": 2048,
    },
    "gate_sae": {"eval_tokens": 512, "splice_sequences": 4, "on_fail": "warn"},
    "train_decoder": {
        "epochs": 1, "budget_tokens": 1024, "batch_tokens": 256, "lr": 0.002, "depth": 1,
        "validation_tokens": 256, "ood_tokens": 128, "fit_tokens": 512,
        "matmul_precision": "highest",
    },
    "gate_decoder": {
        "test_tokens": 256, "ood_tokens": 128, "matmul_precision": "highest", "on_fail": "warn",
    },
    "train_ppo": {
        "tasks": ["cloze"],
        "stages": 3 * [{"steps": 1, "faithfulness": 0.4, "monosemanticity": 0.3, "task": 0.3}],
        "ppo": {"batch_size": 2, "inner_epochs": 1, "replay_tokens": 32, "critic_width": 8},
        "eval_every_steps": 1, "eval_prompts": 1, "eval_tokens": 64,
    },
    "control_ppo": {"test_prompts": 1, "test_tokens": 64, "on_fail": "warn"},
    "rank_features": {
        "budget_tokens": 128, "num_prompts": 1, "validation_tokens": 32, "validation_top": 2,
        "validation_others": 2, "domains": ["label", "cloze"],
    },
    "label_features": {
        "num_features": 4, "control_features": 2, "control_tokens": 256, "score_tokens": 512,
        "fit_tokens": 1024,
    },
    "cluster_features": {"num_probe_tokens": 8, "fingerprint_tokens": 128},
    "train_explainer": {
        "num_pairs": 8, "num_test_positions": 4, "scale_tokens": 128, "width": 8,
        "num_layers": 1, "steps": 2, "batch_size": 4, "bootstrap_resamples": 100,
        "example_tokens": 8,
    },
    "evaluate": {
        "num_prompts": 2, "tasks": ["cloze"], "num_tokens": 128, "deletion_positions": 4,
        "bootstrap_resamples": 100, "matmul_precision": "highest",
    },
    "report": {"max_feature_cards": 2},
}  # fmt: skip


def smallest(*stages: str, **changes: dict[str, Any]) -> list[str]:
    """Overrides of a config: these stages' smallest settings (all without a name), changed."""
    return [
        f"{stage}.{name}={json.dumps(value)}"
        for stage in (stages or SMALLEST)
        for name, value in {**SMALLEST[stage], **changes.get(stage, {})}.items()
    ]
