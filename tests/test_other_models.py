"""All stages, smallest budgets, on tiny random models of other kinds than the debug run's."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.reporting import SilentReporter
from rldecoder.runner import run_pipeline
from rldecoder.stages.table import STAGES
from tests.lm.causal_architectures import tiny_config
from tests.tiny_models import with_tokens_around

pytestmark = pytest.mark.slow

BEGINS_WITH_BOS = ("llama", "gemma3_text")


def settings(model: Path, text: Path, other: Path) -> dict[str, Any]:
    """A run through every stage with nearly nothing to do in each."""
    training = {
        "budget_tokens": 2048, "batch_tokens": 512, "init_tokens": 512, "warmup_steps": 1,
    }  # fmt: skip
    return {
        "name": "tiny",
        "tracking": {"wandb": "off"},
        "sync_tokenizer": {"model": "folder", "path": str(model), "compute_dtype": "float32"},
        "ingest": {
            "sources": [{"type": "local", "paths": [str(text)]}],
            "ood_sources": [{"type": "local", "paths": [str(other)]}],
            "context_length": 32,
            "budget_tokens": {
                "train": 4096, "validation": 512, "label": 1024, "test": 1024, "ood": 512,
            },
            "max_document_chars": 600,
        },
        "baselines": {
            "lens_layers": [2], "fit_tokens": 2048, "validation_tokens": 512, "eval_tokens": 256,
            "num_task_prompts": 0, "ridge_strengths": [0.01],
        },
        "cache_activations": {
            "hook_layer": 2,
            "budget_tokens": {
                "train": 4096, "validation": 512, "label": 1024, "test": 1024, "ood": 512,
            },
        },
        "train_sae": {
            **training, "expansion": 4, "k": 8, "eval_every_steps": 2, "eval_tokens": 256,
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
            "ppo": {
                "batch_size": 2, "inner_epochs": 1, "replay_tokens": 32, "critic_width": 8,
            },
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


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("text")
    topics = pydoc_data.topics.topics
    for name in sorted(topics)[:40]:
        (folder / f"{name.replace('/', '-')}.txt").write_text(topics[name], encoding="utf-8")
    other = tmp_path_factory.mktemp("other")
    for number in range(12):
        lines = [f"row {number}, {i}: {i * number} of {i + number}" for i in range(30)]
        (other / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder, other


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_neox", "llama", "qwen3"])
def test_every_stage_runs(
    model_type: str, tiny_lm_dir: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    config = tiny_config(model_type)
    config.max_position_embeddings = 512  # the tasks' prompts are long
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_lm_dir).save_pretrained(folder)
    if model_type in BEGINS_WITH_BOS:
        folder = with_tokens_around(folder, tmp_path / "with_bos", bos=True)
    run = RunConfig.model_validate(settings(folder, *texts))
    store = ArtifactStore(tmp_path / "store")
    results = run_pipeline(run, store=store, report=SilentReporter(), device="cpu")
    assert [result.ref.stage for result in results] == [stage.name for stage in STAGES]
    for result in results:
        store.verify(result.ref)
