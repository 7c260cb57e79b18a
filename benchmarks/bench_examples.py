"""The examples pass against its limit, the SAE's encoder, and against dense caches.

    python -m benchmarks.bench_examples

One pass over text gives, for every latent, its strongest examples, examples over its range,
windows in which it is silent, and its density. Contenders take turns on the same residuals, so
that a busy minute hits all of them; a throughput is a median over turns, and only ratios within
one run mean anything. Text and SAE are made up (Zipf tokens, a random SAE of the shape asked for):
the work depends on shapes alone. delphi's cache joins where `make readers` has put it.
Results: docs/results.md.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.bench_sae import Synthetic
from benchmarks.timing import seconds
from rldecoder.data.activations import ActivationBatch
from rldecoder.interp.corpus import TokenGrid
from rldecoder.interp.example_pass import ExamplePass
from rldecoder.interp.examples import ExampleSettings
from rldecoder.provenance import peak_memory_bytes
from rldecoder.sae.model import Sae, SaeSpec

app = typer.Typer(help=__doc__, add_completion=False)
console = Console(width=120)

VOCABULARY = 49_152
SKIPPED = 1
"""Positions at a sequence's start that are not read."""


class Text:
    """Residuals of made-up text in memory, in the form that an activation cache is read in."""

    def __init__(self, d_model: int, sequences: int, context: int) -> None:
        rng = np.random.default_rng(0)
        frequency = 1 / np.arange(1, VOCABULARY + 1)
        shape = (sequences, context)
        self.tokens = rng.choice(VOCABULARY, shape, p=frequency / frequency.sum())
        self.context = context
        batches = Synthetic(d_model).batches(sequences * (context - SKIPPED))
        self.resid = next(batches).bfloat16()
        row, pos = np.divmod(np.arange(len(self.resid)), context - SKIPPED)
        self.row, self.pos = torch.from_numpy(row), torch.from_numpy(pos + SKIPPED)
        self.ids = torch.from_numpy(self.tokens[row, pos + SKIPPED])

    def ordered(self, batch_tokens: int) -> Iterator[ActivationBatch]:
        """As `ActivationReader.ordered`."""
        for start in range(0, len(self.resid), batch_tokens):
            part = slice(start, start + batch_tokens)
            yield ActivationBatch(
                self.row[part], self.pos[part], self.ids[part], self.resid[part], None
            )


def dense(sae: Sae, resid: Tensor | None) -> Tensor:
    """[n, L] activations with all their zeros."""
    assert resid is not None
    found = sae.encode(resid.float())
    return torch.zeros(len(resid), sae.num_latents).scatter_(1, found.indices, found.acts)


def naive(text: Text, sae: Sae, settings: ExampleSettings, batch_tokens: int) -> list[Any]:
    """Keep every activation of every latent, then sort each latent's column."""
    cache = torch.cat([dense(sae, batch.resid) for batch in text.ordered(batch_tokens)])
    rng = np.random.default_rng(0)
    width, context = settings.window_tokens, text.context
    window = text.row.numpy() * -(-context // width) + text.pos.numpy() // width
    out: list[Any] = []
    for latent in range(sae.num_latents):
        column = cache[:, latent].numpy()
        order = np.argsort(-column, kind="stable")
        order = order[column[order] > 0]
        _, first = np.unique(window[order], return_index=True)
        peaks = order[np.sort(first)]
        top, rest = peaks[: settings.num_top], peaks[settings.num_top :]
        parts = np.array_split(rest, min(settings.num_quantile, rest.size) or 1)
        quiet = np.setdiff1d(window, window[order])
        drawn = rng.choice(quiet, min(settings.num_negative, quiet.size), replace=False)
        chosen = [*top, *(rng.choice(part) for part in parts if part.size)]
        for row in chosen:
            sequence, pos = int(text.row[row]), int(text.pos[row])
            start = max(0, pos - width // 2)
            near = slice(max(0, row - width // 2), row + width // 2)
            out.append((latent, text.tokens[sequence, start : start + width], column[near]))
        out.append((latent, drawn, order.size / len(column)))
    return out


def delphi_cache(text: Text, sae: Sae, batch_tokens: int) -> None:
    """delphi's own cache and its files, from which it makes examples later: not counted here."""
    cache: Any = importlib.import_module("delphi.latents.cache")
    rows = max(1, batch_tokens // text.context)
    sequences, context = text.tokens.shape
    inner = context - SKIPPED
    tokens = torch.from_numpy(text.tokens[:, SKIPPED:].copy())
    holder = cache.LatentCache(cast("Any", None), {}, rows)
    holder.cache, holder.width = cache.InMemoryCache(batch_size=rows), sae.num_latents
    for number, start in enumerate(range(0, sequences, rows)):
        part = text.resid[start * inner : (start + rows) * inner]
        latents = dense(sae, part).reshape(-1, inner, sae.num_latents)
        holder.cache.add(latents, tokens[start : start + rows], number, "layers.0")
    holder.cache.save()
    with tempfile.TemporaryDirectory() as folder:
        holder.save_splits(5, Path(folder))


@app.command()
def main(
    d_model: int = 576,
    num_latents: int = 5760,
    k: int = 64,
    sequences: Annotated[int, typer.Option(help="Sequences of each turn.")] = 256,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    batch_tokens: int = 4096,
    turns: int = 5,
    readers: Annotated[Path, typer.Option(help="Where delphi is.")] = Path("build/export_readers"),
    only: Annotated[str, typer.Option(help="Only contenders whose name contains this.")] = "",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Print throughputs and their ratios. With `--only`, the peak memory is that of one."""
    torch.set_num_threads(threads)
    sys.path.append(str(readers))
    text = Text(d_model, sequences, context)
    sae = Sae.random_init(SaeSpec(d_model=d_model, num_latents=num_latents, k=k, hook_layer=1), 0)
    sae.requires_grad_(False)
    settings = ExampleSettings(16, 10, 10, 10)

    def encode() -> None:
        for batch in text.ordered(batch_tokens):
            assert batch.resid is not None
            sae.encode(batch.resid.float())

    valid = np.ones(text.tokens.shape, bool)
    valid[:, :SKIPPED] = False
    grid = TokenGrid("label", np.arange(sequences), text.tokens, valid, text.tokens)

    def examples() -> None:
        found = ExamplePass(num_latents, settings, context, 0)
        for batch in text.ordered(batch_tokens):
            assert batch.resid is not None
            found.add(batch, sae.encode(batch.resid.float()))
        found.finish(grid)

    contenders: dict[str, Callable[[], object]] = {
        "encode only": encode,
        "examples": examples,
        "naive dense cache": lambda: naive(text, sae, settings, batch_tokens),
    }
    if (readers / "delphi").is_dir():
        contenders["delphi cache, no examples"] = lambda: delphi_cache(text, sae, batch_tokens)
    contenders = {name: run for name, run in contenders.items() if only in name}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, run in contenders.items():
            spent = seconds(run)
            if turn:  # warm-up
                times[name].append(spent)
    medians = {name: statistics.median(values) for name, values in times.items()}
    table = Table(title=f"{len(text.resid):,} tokens, {num_latents} latents, k {k}, "
                        f"{threads} threads, median of {turns}")  # fmt: skip
    for column in ("pass", "s", "tokens/s", "of encoding", "x naive"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    limit, slow = medians.get("encode only"), medians.get("naive dense cache")
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        table.add_row(
            name, f"{median:.2f}", f"{len(text.resid) / median:,.0f}",
            f"{limit / median:.3f}" if limit else "-", f"{slow / median:.2f}" if slow else "-",
        )  # fmt: skip
    console.print(table)
    gib = peak_memory_bytes(torch.device("cpu")) / (1 << 30)
    console.print(f"peak resident memory of the process: {gib:.1f} GiB")


if __name__ == "__main__":
    app()
