"""SAEBench's core evaluation on a run's SAE, with no hub, in an environment of its own.

SAEBench needs numpy < 2 and datasets < 4, which this project does not run with. So this file
imports nothing of it, and is run by the Python of that environment:

    python -m venv saebench
    saebench/bin/pip install torch==2.13.0 sae-bench==0.6.0
    saebench/bin/pip uninstall torchvision    # where torch is a build for CPUs: PyPI's is not
    HF_HUB_OFFLINE=1 saebench/bin/python benchmarks/run_saebench.py --store artifacts

Model, SAE and text are those of the newest run in the store. What needs a hub or a larger machine
is named in docs/experiments/2026-11-30-lenses-and-saebench.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading


def main() -> None:
    """Print the metrics as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="of a finished run")
    parser.add_argument("--split", default="test", help="of its text")
    parser.add_argument("--batches", type=int, default=8, help="of 8 contexts of 128 tokens")
    parser.add_argument("--sae", type=Path, help="another SAE in sae_lens's format")
    given = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()

    # A folder instead of a name: transformer_lens then asks no hub.
    folder = newest(given.store / "sync_tokenizer") / "model"
    # Its list of names has no SmolLM2; the architecture (Llama) it can read.
    loading.get_official_model_name = lambda model_name: model_name
    model = HookedTransformer.from_pretrained_no_processing(
        str(folder), device="cpu", dtype=torch.float32
    )
    sae = SAE.load_from_disk(given.sae or newest(given.store / "train_sae") / "sae", device="cpu")
    sae.cfg.metadata.prepend_bos = False
    _, sae, _ = load_and_format_sae("rl-decoder", sae, "cpu")

    store = ActivationsStore.from_sae(
        model, sae, tokens(given.store, given.split), context_size=128, streaming=False
    )
    config = CoreEvalConfig(
        model_name=str(folder),
        batch_size_prompts=8,
        n_eval_reconstruction_batches=given.batches,
        n_eval_sparsity_variance_batches=given.batches,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        llm_dtype="float32",
        context_size=128,
    )
    words = model.tokenizer
    ignored = {words.pad_token_id, words.eos_token_id, words.bos_token_id}
    metrics, _ = run_evals(sae, store, model, config, ignore_tokens=ignored)
    print(json.dumps(metrics, indent=1, default=float))
    print(f"{time.perf_counter() - started:.0f} s")


def newest(folder: Path) -> Path:
    """The artifact of a stage that was published last."""
    return max(folder.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime).parent


def tokens(store: Path, split: str) -> Dataset:
    """The run's packed sequences of a split, as sae_lens reads tokens."""
    shards = sorted(map(str, newest(store / "ingest").glob(f"{split}-*.parquet")))
    rows = load_dataset("parquet", data_files=shards, split="train")
    return rows.select_columns(["input_ids"]).rename_column("input_ids", "tokens")


if __name__ == "__main__":
    main()
