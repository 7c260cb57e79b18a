"""SAEBench's core and sparse probing, with no hub, in an environment of its own.

SAEBench needs numpy < 2 and datasets < 4, which this project does not run with. So this file
imports nothing of it, and is run by the Python of that environment:

    python -m venv saebench
    saebench/bin/pip install torch==2.13.0 sae-bench==0.6.0
    saebench/bin/pip uninstall torchvision    # where torch is a build for CPUs: PyPI's is not
    export HF_HUB_OFFLINE=1 JAXTYPING_DISABLE=1    # else probing fails at a call of SAEBench's own
    saebench/bin/python benchmarks/run_saebench.py core --store artifacts --out ours.json
    saebench/bin/python benchmarks/run_saebench.py probing --store artifacts --texts TEXTS.parquet
    saebench/bin/python benchmarks/run_saebench.py table ours.json peer.json

Model, SAE and text are those of the newest run in the store; `--sae` names another SAE in the
format of sae_lens. What needs a hub or a larger machine is named in
docs/experiments/2026-11-30-lenses-and-saebench.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

CONTEXT = 128
"""Tokens that SAEBench gives the model at once."""


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    core = commands.add_parser("core", help="faithfulness, reconstruction, sparsity")
    probing = commands.add_parser("probing", help="classes of local texts from single latents")
    for each in (core, probing):
        each.add_argument("--store", type=Path, required=True, help="of a finished run")
        each.add_argument("--sae", type=Path, help="another SAE in sae_lens's format")
        each.add_argument("--out", type=Path, help="a JSON file for `table`")
    core.add_argument("--split", default="test", help="of the run's text")
    core.add_argument("--batches", type=int, default=8, help="each of two contexts of 128 tokens")
    probing.add_argument("--texts", type=Path, required=True, help="Parquet: text, domain")
    probing.add_argument("--classes", type=int, default=5, help="the most frequent domains")
    probing.add_argument("--train", type=int, default=96, help="texts a class to fit probes on")
    probing.add_argument("--test", type=int, default=48, help="texts a class to measure them on")
    probing.add_argument("--tokens", type=int, default=64, help="of each text")
    probing.add_argument("--activations", type=Path, help="a folder that keeps the model's states")
    table = commands.add_parser("table", help="results side by side")
    table.add_argument("files", type=Path, nargs="+", help="the first one is compared with")

    given = parser.parse_args()
    if given.command == "table":
        print_table(given.files)
        return
    started = time.perf_counter()
    model, sae = loaded(given.store, given.sae)
    measured = run_core(given, model, sae) if given.command == "core" else probe(given, model, sae)
    text = json.dumps(measured, indent=1)
    print(text)
    print(f"{time.perf_counter() - started:.0f} s")
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")


def loaded(store: Path, other: Path | None) -> tuple[Any, Any]:
    """The run's model as transformer_lens has it, and an SAE as SAEBench wants it."""
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens import SAE
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    torch.manual_seed(0)
    # A folder instead of a name: transformer_lens then asks no hub.
    folder = newest(store / "sync_tokenizer") / "model"
    # Its list of names has no SmolLM2; the architecture (Llama) it can read.
    loading.get_official_model_name = lambda model_name: model_name
    model = HookedTransformer.from_pretrained_no_processing(
        str(folder), device="cpu", dtype=torch.float32
    )
    sae = SAE.load_from_disk(other or newest(store / "train_sae") / "sae", device="cpu")
    # As SAEBench does with what it loads by name: rows of unit norm. sae_lens raises this where
    # folding them would change which latents fire (TopK); those stay as they are.
    with contextlib.suppress(NotImplementedError):
        sae.fold_W_dec_norm()
    sae.cfg.metadata.prepend_bos = False
    # It wants a name, which sae_lens writes only where it loaded the model itself.
    sae.cfg.metadata.model_name = sae.cfg.metadata.model_name or model.cfg.model_name
    _, sae, _ = load_and_format_sae("rl-decoder", sae, "cpu")
    return model, sae


def run_core(given: argparse.Namespace, model: Any, sae: Any) -> dict[str, list[float]]:
    """SAEBench's metrics, one value a batch of two contexts."""
    from datasets import load_dataset
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_lens.training.activations_store import ActivationsStore

    # A batch of its own is one packed sequence of the run: what differs between batches is text.
    shards = sorted(map(str, newest(given.store / "ingest").glob(f"{given.split}-*.parquet")))
    rows = load_dataset("parquet", data_files=shards, split="train")
    rows = rows.select_columns(["input_ids"]).rename_column("input_ids", "tokens")
    each = -(-2 * CONTEXT // len(rows[0]["tokens"]))
    config = CoreEvalConfig(
        model_name=model.cfg.model_name,
        batch_size_prompts=2,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        llm_dtype="float32",
        context_size=CONTEXT,
    )
    words = model.tokenizer
    ignored = {words.pad_token_id, words.eos_token_id, words.bos_token_id}

    found: dict[str, list[float]] = {}
    for batch in range(given.batches):
        part = rows.select(range(batch * each, (batch + 1) * each))
        store = ActivationsStore.from_sae(model, sae, part, context_size=CONTEXT, streaming=False)
        metrics, _ = run_evals(sae, store, model, config, ignore_tokens=ignored)
        metrics.pop("token_stats")
        for group in metrics.values():
            for name, value in group.items():
                found.setdefault(name, []).append(float(value))
    return found


def probe(given: argparse.Namespace, model: Any, sae: Any) -> dict[str, list[float]]:
    """SAEBench's sparse probing on texts of this machine, one accuracy a class."""
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    # SAEBench asks the hub for a data set by name. Ours has a name, and is given here.
    name = given.texts.stem
    train, test = classes(given.texts, given.classes, given.train, given.test)
    probing.dataset_utils.get_multi_label_train_test_data = lambda *_: (train, test)
    probing.dataset_info.chosen_classes_per_dataset[name] = list(train)
    config = SparseProbingEvalConfig(
        dataset_names=[name],
        probe_train_set_size=given.train,
        probe_test_set_size=given.test,
        context_length=given.tokens,
        llm_batch_size=16,
        llm_dtype="float32",
        model_name=model.cfg.model_name,
    )
    folder = given.activations or given.store / ".saebench"
    # The first call also fits probes to the model's states. That moves the random numbers that draw
    # each class's negatives, so only later calls draw the same ones for every SAE.
    if not (folder / f"{name}_activations.pt").is_file():
        probing.run_eval_single_sae(config, sae, model, "cpu", str(folder))
    _, by_class = probing.run_eval_single_sae(config, sae, model, "cpu", str(folder))
    (found,) = by_class.values()
    return {key: [float(value) for value in values.values()] for key, values in found.items()}


def classes(
    path: Path, count: int, train: int, test: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts of the most frequent domains, whole documents apart; each begins in its middle, so
    that no title tells its class."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["text", "domain"]).to_pylist()
    by_domain: dict[str, list[str]] = {}
    for index in np.random.default_rng(0).permutation(len(rows)):
        text = rows[index]["text"]
        by_domain.setdefault(rows[index]["domain"], []).append(text[len(text) // 2 :])

    halves: tuple[dict[str, list[str]], dict[str, list[str]]] = {}, {}
    frequent = sorted(by_domain, key=lambda domain: (-len(by_domain[domain]), domain))
    for domain in sorted(frequent[:count]):
        texts = by_domain[domain]
        if len(texts) < train + test:
            raise SystemExit(f"{domain} has {len(texts)} texts, not {train + test}.")
        halves[0][domain], halves[1][domain] = texts[:train], texts[train : train + test]
    return halves


def print_table(files: list[Path]) -> None:
    """Means with 95 % intervals, and paired differences to the first file's."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    first = next(iter(results.values()))
    for metric in first:
        for name, found in results.items():
            values = np.array(found[metric])
            line = f"{metric:38} {name:12} {interval(values)}"
            if found is not first:
                line += f"   less the first: {interval(values - np.array(first[metric]))}"
            print(line)


def interval(values: np.ndarray) -> str:
    """The mean, and the percentiles of 2,000 resampled ones."""
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return f"{values.mean():.4f} [{low:.4f}, {high:.4f}]"


def newest(folder: Path) -> Path:
    """The artifact of a stage that was published last."""
    return max(folder.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime).parent


if __name__ == "__main__":
    main()
