"""Caching by two Ray workers of one thread against one process of two, and what a shard costs more.

    python -m benchmarks.bench_shards STORE

STORE is an artifact store in which a run has published `sync_tokenizer` and `ingest`. Unless one is
named, a cluster is started on this machine alone. All take turns on the same shards, models loaded
before; the ratios are of medians, so that a busy minute hits all of them. Results: docs/results.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.bench_cache import newest
from rldecoder.artifacts.catalogue import Corpus, ModelFolder
from rldecoder.config.executor import ExecutorConfig
from rldecoder.data.forward import PassSettings, plan_shards
from rldecoder.data.shards import SplitSequences
from rldecoder.executors.jobs import Job, ShardFile, make_job
from rldecoder.executors.local import Crew, Executor, LocalExecutor
from rldecoder.executors.ray_cluster import RayExecutor
from rldecoder.lm.specs import ModelRecord
from rldecoder.reporting import SilentBar, SilentReporter
from rldecoder.stages.cache_activations import CacheWorker

app = typer.Typer(help=__doc__, add_completion=False)
console = Console()
CPU = torch.device("cpu")


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
    files = [ShardFile(f"shard-{s.index}", s.num_sequences * text.length) for s in plan]
    folder.mkdir()
    return make_job(CacheWorker, settings, files, folder=folder, owner=folder.name)


def _ready(stack: ExitStack, executor: Executor, job: Job, workers: int = 1) -> Crew:
    """A crew of which every worker has its model, and is warm."""
    crew = stack.enter_context(executor.open(job, device=CPU, report=SilentReporter()))
    while crew.num_ready < workers:
        crew.run([0, 1], SilentBar())
    crew.run([0, 1, 2, 3], SilentBar())
    return crew


def _seconds(crew: Crew, job: Job, threads: int) -> float:
    torch.set_num_threads(threads)
    started = time.perf_counter()
    crew.run(range(len(job.files)), SilentBar())
    return time.perf_counter() - started


@app.command()
def main(
    store: Path,
    shard_tokens: Annotated[int, typer.Option(help="Tokens a shard.")] = 4096,
    shards: Annotated[int, typer.Option(help="Shards a turn.")] = 8,
    turns: int = 5,
    address: Annotated[str, typer.Option(help="As `executor.address`; two cores free.")] = "local",
) -> None:
    """Print both ratios."""

    def ray(workers: int) -> RayExecutor:
        config = ExecutorConfig(type="ray", address=address, workers=workers)
        return RayExecutor(config, threads=1, timeout_seconds=600)

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        jobs = {
            kind: _job(store, Path(name) / kind, shard_tokens, shards)
            for kind in ("here", "two", "one")
        }
        crews = {
            "here": _ready(stack, LocalExecutor(), jobs["here"]),
            "two": _ready(stack, ray(2), jobs["two"], 2),
        }
        spent: dict[str, list[float]] = {"process of 2": [], "two workers": [], "process of 1": []}
        for _ in range(turns):
            spent["process of 2"].append(_seconds(crews["here"], jobs["here"], 2))
            spent["two workers"].append(_seconds(crews["two"], jobs["two"], 2))
        stack.pop_all().close()  # one core for each of the next two

        with ExitStack() as alone:
            crews = {
                "here": _ready(alone, LocalExecutor(), jobs["here"]),
                "one": _ready(alone, ray(1), jobs["one"]),
            }
            spent["one worker"] = []
            for _ in range(turns):
                spent["process of 1"].append(_seconds(crews["here"], jobs["here"], 1))
                spent["one worker"].append(_seconds(crews["one"], jobs["one"], 1))

        median = {kind: statistics.median(seconds) for kind, seconds in spent.items()}
        count = len(jobs["here"].files)
        for kind, seconds in median.items():
            console.print(f"{kind}: {seconds / count * 1000:,.0f} ms a shard")
        console.print(
            f"two workers of one thread / one process of two: "
            f"{median['process of 2'] / median['two workers']:.3f} of its throughput"
        )
        more = median["one worker"] - median["process of 1"]
        console.print(
            f"overhead a shard of {shard_tokens:,} tokens: {more / count * 1000:,.1f} ms, "
            f"{more / median['process of 1']:.1%}"
        )


if __name__ == "__main__":
    app()
