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
from tests.smallest import SMALLEST
from tests.tiny_models import with_tokens_around

pytestmark = pytest.mark.slow

BEGINS_WITH_BOS = ("llama", "gemma3_text")


def settings(model: Path, text: Path, other: Path) -> dict[str, Any]:
    """A run through every stage with nearly nothing to do in each."""
    sources = {
        "sources": [{"type": "local", "paths": [str(text)]}],
        "ood_sources": [{"type": "local", "paths": [str(other)]}],
    }
    return {
        **SMALLEST,
        "name": "tiny",
        "tracking": {"wandb": "off"},
        "sync_tokenizer": {"model": "folder", "path": str(model), "compute_dtype": "float32"},
        "ingest": {**SMALLEST["ingest"], **sources},
    }


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
