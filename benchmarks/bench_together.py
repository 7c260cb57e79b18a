"""SAE training by two processes of one thread against one process of two threads.

    python -m benchmarks.bench_together STORE

STORE is an artifact store in which a run has published `cache_activations` (`make quickstart`
leaves one in artifacts/). The stage itself trains on those residuals, in turns of a few steps; its
own tokens a second count, so that starting processes and loading do not. Results: docs/scale.md.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console

from benchmarks.bench_cache import newest
from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import ActivationCache, Corpus, ModelFolder
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.reporting import SilentReporter
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import SaeInputs
from rldecoder.stages.table import stage_named

app = typer.Typer(help=__doc__, add_completion=False)
console = Console()
Kind = TypeVar("Kind", bound=Artifact)


def tokens_per_second(inputs: SaeInputs, config: TrainSaeConfig) -> float:
    """Of a training from its first step."""
    with tempfile.TemporaryDirectory() as name:
        for part in ("out", "progress"):
            (Path(name) / part).mkdir()
        ctx = StageContext(
            Path(name) / "out", Path(name) / "progress", 0, torch.device("cpu"), SilentReporter()
        )
        found = stage_named("train_sae").run(inputs, config, ctx).metrics["tokens_per_second"]
    assert isinstance(found, float)
    return found


def _newest(kind: type[Kind], store: Path) -> Kind:
    return kind(folder=newest(store, kind.stage), digest="", metrics={}, config={})


@app.command()
def main(
    store: Path,
    batch_tokens: int = 2048,
    steps: Annotated[int, typer.Option(help="Of a turn.")] = 20,
    turns: int = 3,
    processes: int = 2,
) -> None:
    """Print tokens a second, turn by turn, and the ratio of the medians."""
    torch.set_num_threads(processes)
    inputs = SaeInputs(
        _newest(ModelFolder, store), _newest(Corpus, store), _newest(ActivationCache, store)
    )
    config = TrainSaeConfig(batch_tokens=batch_tokens, budget_tokens=steps * batch_tokens)
    found: dict[int, list[float]] = {1: [], processes: []}
    for _ in range(turns):
        for size, speeds in found.items():
            asked = config.model_copy(update={"processes": size})
            speeds.append(tokens_per_second(inputs, asked))
    for size, speeds in found.items():
        listed = ", ".join(f"{speed:,.0f}" for speed in speeds)
        console.print(f"{size} of {processes // size} threads: {listed} tokens a second")
    one, several = (statistics.median(speeds) for speeds in found.values())
    console.print(f"{processes} processes / one: {several / one:.3f} of its throughput")


if __name__ == "__main__":
    app()
