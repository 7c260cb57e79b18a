"""Caching by two Ray workers of one thread against one process of two, and what a shard costs more.

    python -m benchmarks.bench_shards STORE

STORE is an artifact store in which a run has published `sync_tokenizer` and `ingest`. Unless one is
named, a cluster is started on this machine alone. All take turns on the same shards, models loaded
before; the ratios are of medians, so that a busy minute hits all of them. Turns go on until the
time is up, two at least. CPU seconds, of this process and all below it, say how much of that is
more work and how much is waiting for cores that others have. Results: docs/scale.md.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import torch
import typer
from rich.console import Console

from benchmarks.bench_cache import newest
from rldecoder.artifacts.catalogue import Corpus, ModelFolder
from rldecoder.config.executor import ExecutorConfig
from rldecoder.data.forward import PassSettings, plan_shards
from rldecoder.data.shards import SplitSequences
from rldecoder.executors.jobs import Job, make_job
from rldecoder.executors.local import Crew, Executor, LocalExecutor
from rldecoder.executors.ray_cluster import RayExecutor
from rldecoder.lm.specs import ModelRecord
from rldecoder.reporting import SilentBar, SilentReporter
from rldecoder.stages.cache_activations import CacheWorker

app = typer.Typer(help=__doc__, add_completion=False)
console = Console()
CPU = torch.device("cpu")
# Ray's workers step back for everybody else by default, and this process does not.
os.environ.setdefault("RAY_worker_niceness", "0")
MIN_TURNS = 2


def _job(store: Path, folder: Path, shard_tokens: int, num_shards: int) -> Job:
    """Shards of the train split, of `shard_tokens` each."""
    model, corpus = newest(store, ModelFolder.stage), newest(store, Corpus.stage)
    text = SplitSequences(corpus, "train")
    count = min(text.num_sequences, num_shards * max(1, shard_tokens // text.length))
    plan = plan_shards({"train": count}, text.length, shard_tokens)
    record = ModelFolder.record.path(model)
    settings = PassSettings(
        model=ModelFolder.model.path(model).absolute(),
        record=record.absolute(),
        corpus=corpus.absolute(),
        hook_layer=ModelRecord.load(record).num_layers // 2,
        micro_batch=8,
        plan=tuple(plan),
    )
    folder.mkdir()
    return make_job(CacheWorker, settings, folder=folder, owner=folder.name)


class _Entry(NamedTuple):
    """Who takes turns."""

    name: str
    crew: Crew
    job: Job
    threads: int
    """Of this process meanwhile."""


def _ready(
    stack: ExitStack, name: str, executor: Executor, job: Job, *, threads: int, workers: int = 1
) -> _Entry:
    """A crew of which every worker has its model, and is warm."""
    stack.callback(executor.close)  # else its workers keep their cores for a next job
    crew = stack.enter_context(executor.open(job, device=CPU, report=SilentReporter()))
    torch.set_num_threads(threads)
    while crew.num_ready < workers:
        crew.run(range(workers), SilentBar())
    crew.run(range(workers), SilentBar())
    console.print(f"{name}: ready")
    return _Entry(name, crew, job, threads)


def _cpu_seconds() -> float:
    """Of this process and those that it started, a cluster's among them."""
    total = 0.0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def _take_turns(entries: Sequence[_Entry], seconds: float) -> dict[str, float]:
    """Median seconds of all shards, by name."""
    spent: dict[str, list[float]] = {entry.name: [] for entry in entries}
    cpu: dict[str, list[float]] = {entry.name: [] for entry in entries}
    begun = time.perf_counter()
    while len(spent[entries[0].name]) < MIN_TURNS or time.perf_counter() - begun < seconds:
        for entry in entries:
            torch.set_num_threads(entry.threads)
            started, before = time.perf_counter(), _cpu_seconds()
            entry.crew.run(range(len(entry.job.files)), SilentBar())
            spent[entry.name].append(time.perf_counter() - started)
            cpu[entry.name].append(_cpu_seconds() - before)
    shards = len(entries[0].job.files)
    for name, found in spent.items():
        per_shard = ", ".join(f"{turn / shards:.3f}" for turn in found)
        console.print(f"{name}: {per_shard} s a shard, turn by turn")
        console.print(f"{name}: {statistics.median(cpu[name]) / shards:.3f} CPU s a shard")
    return {name: statistics.median(found) for name, found in spent.items()}


@app.command()
def main(
    store: Path,
    shard_tokens: Annotated[int, typer.Option(help="Tokens a shard.")] = 4096,
    shards: Annotated[int, typer.Option(help="Shards a turn.")] = 4,
    seconds: Annotated[float, typer.Option(help="Of turns, for each of the two ratios.")] = 60,
    address: Annotated[str, typer.Option(help="As `executor.address`; two cores free.")] = "local",
) -> None:
    """Print both ratios."""

    def ray(workers: int) -> RayExecutor:
        config = ExecutorConfig(type="ray", address=address, workers=workers)
        return RayExecutor(config, threads=1, timeout_seconds=600)

    with tempfile.TemporaryDirectory() as name:
        jobs = {
            kind: _job(store, Path(name) / kind, shard_tokens, shards)
            for kind in ("here", "two", "one")
        }
        here = jobs["here"]
        with ExitStack() as stack:
            alone = _ready(stack, "process of 2", LocalExecutor(), here, threads=2)
            spread = _ready(stack, "two workers", ray(2), jobs["two"], threads=2, workers=2)
            median = _take_turns([alone, spread], seconds)
        with ExitStack() as stack:  # one core for each
            alone = _ready(stack, "process of 1", LocalExecutor(), here, threads=1)
            spread = _ready(stack, "one worker", ray(1), jobs["one"], threads=1)
            median |= _take_turns([alone, spread], seconds)

    console.print(
        f"two workers of one thread / one process of two: "
        f"{median['process of 2'] / median['two workers']:.3f} of its throughput"
    )
    more = median["one worker"] - median["process of 1"]
    console.print(
        f"overhead a shard of {shard_tokens:,} tokens: {more / len(here.files) * 1000:,.1f} ms, "
        f"{more / median['process of 1']:.1%}"
    )


if __name__ == "__main__":
    app()
