"""The activation cache against its limits: the bare forward pass, and the disk.

    python -m benchmarks.bench_cache STORE

STORE is an artifact store in which a run has published `sync_tokenizer`, `ingest` and
`cache_activations` (`make quickstart` leaves one in artifacts/). Writing and the bare pass take
turns on the same sequences, so that a busy minute hits both. Results: docs/results.md.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.timing import seconds
from rldecoder.artifacts.catalogue import ModelFolder
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import VECTOR_COLUMNS, read_meta, write_activation_shard
from rldecoder.data.forward import ActivationPass
from rldecoder.data.shards import read_tokens
from rldecoder.lm.frozen import FrozenLM

app = typer.Typer(help=__doc__, add_completion=False)
console = Console()


def newest(store: Path, stage: str) -> Path:
    """The stage's newest artifact."""
    found = sorted(store.glob(f"{stage}/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise typer.BadParameter(f"{store} holds no artifact of {stage}")
    return found[-1].parent


@app.command()
def main(
    store: Path,
    sequences: Annotated[int, typer.Option(help="Sequences a turn.")] = 16,
    turns: int = 5,
    threads: int = 2,
) -> None:
    """Print both ratios."""
    torch.set_num_threads(threads)
    model = newest(store, ModelFolder.stage)
    lm = FrozenLM.load(ModelFolder.model.path(model), record=ModelFolder.record.path(model))
    cache = newest(store, "cache_activations")
    meta = read_meta(cache)
    ids = torch.from_numpy(read_tokens(newest(store, "ingest"), "train", sequences))
    forward = ActivationPass(lm, meta.hook_layer, 8, console.print)
    stream = ActivationPass(lm, meta.hook_layer, 8, console.print, with_final=False)

    def bare(run: Callable[[Tensor], object]) -> None:
        for part in ids.split(8):
            run(part)

    def through(part: Tensor) -> object:
        return lm.resid_and_final(part, meta.hook_layer)

    def trunk(part: Tensor) -> object:
        return lm.trunk(part, meta.hook_layer)

    times: dict[str, list[float]] = {"bare": [], "cache": [], "bare trunk": [], "stream": []}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as writer:

        def cached() -> None:
            batch = forward.shard(ids, 0, lambda tokens: None)
            writer.submit(write_activation_shard, Path(folder) / "x.parquet", batch).result()

        bare(through)  # warm-up
        for _ in range(turns):
            times["bare"].append(seconds(lambda: bare(through)))
            times["cache"].append(seconds(cached))
            times["bare trunk"].append(seconds(lambda: bare(trunk)))
            times["stream"].append(seconds(lambda: stream.shard(ids, 0, lambda tokens: None)))
    speed = {name: ids.numel() / statistics.median(values) for name, values in times.items()}
    console.print(f"layer {meta.hook_layer} of {meta.num_layers}, {lm.dtype}, {threads} threads")
    for name, reference in (("cache", "bare"), ("stream", "bare trunk")):
        console.print(
            f"{name}: {speed[name]:,.0f} tokens/s, {reference} pass: {speed[reference]:,.0f}; "
            f"ratio {speed[name] / speed[reference]:.3f}"
        )

    reader_bytes = ActivationReader(cache, "train").num_tokens * 2 * 2 * meta.d_model

    def read(shuffled: bool) -> None:
        reader = ActivationReader(cache, "train")
        batches = (
            reader.shuffled(4096, seed=0, columns=VECTOR_COLUMNS)
            if shuffled
            else reader.ordered(4096, columns=VECTOR_COLUMNS)
        )
        for batch in batches:
            assert batch.resid is not None

    for shuffled in (False, True):
        read(shuffled)
        median = statistics.median(seconds(partial(read, shuffled)) for _ in range(turns))
        name = "shuffled" if shuffled else "in order"
        console.print(f"reading {name}: {reader_bytes / median / 1e9:.2f} GB/s from the page cache")


if __name__ == "__main__":
    app()
