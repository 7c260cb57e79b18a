"""SAE training against public trainers: speed of a step, and quality after equal tokens.

    python -m benchmarks.bench_sae speed
    python -m benchmarks.bench_sae quality --activations artifacts/cache_activations/<digest>
    python -m benchmarks.bench_sae spec
    python -m benchmarks.bench_sae crossover

The peers come with `pip install -e '.[bench]'`. Speed is a ratio within one run: contenders take
turns, step by step, so that a busy minute hits all of them. Results: docs/results.md.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.sae_peers import Contender, Problem, contenders
from benchmarks.timing import clock
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.precision import fast_dtype
from rldecoder.provenance import peak_memory_bytes
from rldecoder.sae import architectures
from rldecoder.sae.autoencode import autoencode, autoencode_dense
from rldecoder.sae.model import SaeSpec
from rldecoder.sae.training import SaeTrainer, input_statistics
from rldecoder.seeds import torch_generator

app = typer.Typer(help=__doc__, no_args_is_help=True)
console = Console(width=120)

Threads = Annotated[int, typer.Option(help="Threads of torch.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
STARTS = "b_dec where a library leaves it at zero: at the data's mean, as it comes, or both."
ONLY = "Only contenders whose name contains one of these (separated by commas)."


class Synthetic:
    """Sparse sums of a known dictionary of unit directions, some far more frequent than others."""

    def __init__(self, d_model: int = 576, directions: int = 4608, active: int = 16) -> None:
        self.d_model, self.active = d_model, active
        rows = torch.randn(directions, d_model, generator=torch_generator(0, "rows"))
        self.truth: Tensor | None = F.normalize(rows, dim=1)
        self._shift = torch.randn(d_model, generator=torch_generator(0, "shift"))
        self._frequency = torch.arange(1, directions + 1).float().rsqrt()
        self.validation = self._batch(8192, "validation", 0)
        self.held_out = self._batch(8192, "held out", 0)

    def batches(self, num_tokens: int) -> Iterator[Tensor]:
        """Endless [N, D] batches, the same ones at every call."""
        for index in itertools.count():
            yield self._batch(num_tokens, "train", index)

    def _batch(self, num_tokens: int, *name: str | int) -> Tensor:
        generator = torch_generator(1, *name)
        weights = self._frequency.expand(num_tokens, -1)
        active = torch.multinomial(weights, self.active, generator=generator)
        size = torch.rand(num_tokens, self.active, generator=generator) + 0.5
        assert self.truth is not None
        sums = F.embedding_bag(active, self.truth, per_sample_weights=size, mode="sum")
        return sums + self._shift


class Cached:
    """Residuals of a language model, scaled to a variance of 1 a dimension for all contenders."""

    truth: Tensor | None = None

    def __init__(self, folder: Path) -> None:
        self._train = ActivationReader(folder, "train")
        self.d_model = self._train.meta.d_model
        probe = next(self._train.shuffled(min(16_384, self._train.num_tokens), seed=0)).resid
        assert probe is not None
        self.scale = float(probe.float().var(0).mean().rsqrt())
        self.validation, self.held_out = (self._rows(folder, s) for s in ("validation", "test"))

    def _rows(self, folder: Path, split: str) -> Tensor:
        reader = ActivationReader(folder, split)
        rows = next(reader.ordered(min(reader.num_tokens, 16_384))).resid
        assert rows is not None
        return rows.float() * self.scale

    def batches(self, num_tokens: int) -> Iterator[Tensor]:
        """Endless [N, D] batches, the same ones at every call."""
        for epoch in itertools.count():
            for batch in self._train.shuffled(num_tokens, seed=0, epoch=epoch):
                assert batch.resid is not None
                yield batch.resid.float() * self.scale


@app.command()
def speed(
    architecture: Annotated[str, typer.Option(help="topk or batchtopk.")] = "topk",
    d_model: int = 576,
    num_latents: int = 5760,
    k: int = 64,
    batch_tokens: int = 4096,
    steps: Annotated[int, typer.Option(help="Timed steps of each contender.")] = 9,
    only: Annotated[str, typer.Option(help=ONLY)] = "",
    device: Device = "cpu",
    threads: Threads = 2,
) -> None:
    """Median time of a training step; all contenders on the same batches, in turn.

    With `--only`, the peak memory is that of one contender (and of the benchmark's batches).
    """
    torch.set_num_threads(threads)
    where = torch.device(device)
    made = itertools.islice(Synthetic(d_model).batches(batch_tokens), steps + 2)
    batches = [x.to(where) for x in made]

    # In turn on the same batch: what else the machine does slows all of them alike.
    problem = Problem(d_model, num_latents, k, batch_tokens, 1000, batches[0], device=device)
    running = {
        name: make(problem)
        for name, make in contenders(architecture, device).items()
        if _asked_for(name, only)
    }
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for index, x in enumerate(batches):
        for name, contender in running.items():
            started = clock(where)
            contender.step(x)
            if index >= 2:  # warm-up
                seconds[name].append(clock(where) - started)

    # Useful arithmetic: one dense product, and the rest for the active latents alone. A plain
    # product on the same device is the peak that it is held against.
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = medians.get("sae_lens float32")
    flops = 2.0 * batch_tokens * d_model * (num_latents + 6 * k)
    gib = peak_memory_bytes(where) / (1 << 30)
    dtype = fast_dtype("bfloat16", where)
    peak = _matmul_rate(where, dtype)

    table = Table(
        title=f"{architecture}: d_model {d_model}, {num_latents} latents, k {k}, "
        f"batch {batch_tokens}, {device}, {threads} threads, median of {steps}"
    )
    for column in (
        "trainer", "ms a step", "fastest", "tokens/s", "sparse GFLOP/s", "of peak", "x sae_lens"
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "trainer" else "right")
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        ratio = f"{reference / median:.2f}" if reference else "-"
        table.add_row(
            name, f"{1e3 * median:.1f}", f"{1e3 * min(seconds[name]):.1f}",
            f"{batch_tokens / median:,.0f}", f"{flops / median / 1e9:,.0f}",
            f"{flops / median / peak:.1%}", ratio,
        )  # fmt: skip
    console.print(table)
    console.print(f"peak: a square matrix product in {dtype}, {peak / 1e9:,.0f} GFLOP/s")
    console.print(f"peak memory: {gib:.1f} GiB")


@app.command()
def quality(
    activations: Annotated[
        Path | None, typer.Option(help="A cache_activations artifact; default: synthetic data.")
    ] = None,
    architecture: Annotated[str, typer.Option(help="topk or batchtopk.")] = "topk",
    num_latents: int = 5760,
    k: int = 64,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Default: 2048, on synthetic data 512.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Training tokens of each run.")] = 307_200,
    rates: Annotated[
        str, typer.Option(help="Learning rates tried by all.")
    ] = "1e-3,3e-3,6e-3,1e-2",
    d_model: Annotated[int, typer.Option(help="Synthetic data: width.")] = 576,
    directions: Annotated[int, typer.Option(help="Synthetic data: true directions.")] = 4608,
    active: Annotated[int, typer.Option(help="Synthetic data: active directions a token.")] = 16,
    only: Annotated[str, typer.Option(help=ONLY)] = "",
    starts: Annotated[str, typer.Option(help=STARTS)] = "mean,zero",
    device: Device = "cpu",
    threads: Threads = 2,
) -> None:
    """Held-out fvu (and recovery of a known dictionary) after equal tokens and equal tuning.

    Every trainer's rate is chosen by its fvu on validation data; the table shows test data.
    """
    if set(starts.split(",")) - {"mean", "zero"}:
        raise typer.BadParameter(f"--starts is mean, zero or mean,zero, not {starts!r}")
    torch.set_num_threads(threads)

    # All trainers read the same batches in the same order.
    data: Synthetic | Cached
    if activations is None:
        data = Synthetic(d_model, directions, active)
    else:
        data = Cached(activations)
    batch_tokens = batch_tokens or (512 if activations is None else 2048)
    num_steps = tokens // batch_tokens
    where = torch.device(device)
    batches = [x.to(where) for x in itertools.islice(data.batches(batch_tokens), num_steps)]
    sample = torch.cat(batches)[:16_384]

    table = Table(title=f"{architecture} after {tokens:,} tokens, batch {batch_tokens}, k {k}")
    for column in ("trainer", "b_dec start", "lr", "validation fvu", "test fvu", "L0", "recovery"):
        table.add_column(column, justify="left" if column == "trainer" else "right")
    for name, make in contenders(architecture, device).items():
        if not _asked_for(name, only) or "autocast" in name:
            continue
        # Where a library leaves b_dec at zero, it is also given the mean that others start from.
        leaves_zero = name.startswith(("sae_lens", "sparsify"))
        for start in starts.split(",") if leaves_zero else ["mean"]:
            best: tuple[float, list[str]] | None = None
            for rate in (float(text) for text in rates.split(",")):
                problem = Problem(
                    data.d_model, num_latents, k, batch_tokens, num_steps, sample, rate,
                    start == "mean", device,
                )  # fmt: skip
                torch.manual_seed(0)
                contender = make(problem)
                for x in batches:
                    contender.step(x)

                # The rate is chosen on one split and reported on another.
                chosen_by, _ = fvu(contender, data.validation.to(where))
                lost, l0 = fvu(contender, data.held_out.to(where))
                row = [name, start, f"{rate:g}", f"{chosen_by:.4f}",
                       f"{lost:.4f}", f"{l0:.1f}", _recovery(contender, data.truth)]  # fmt: skip
                console.print("  ".join(row), style="dim", highlight=False)
                if best is None or chosen_by < best[0]:
                    best = (chosen_by, row)
            assert best is not None
            table.add_row(*best[1])
    console.print(table)


@app.command()
def spec(
    d_model: int = 4096,
    num_latents: int = 40_960,
    batch_tokens: int = 4096,
    steps: Annotated[int, typer.Option(help="Timed steps.")] = 3,
    device: Device = "cpu",
    threads: Threads = 2,
) -> None:
    """Step time and peak memory at the plan's size and settings: relu, L1, lr 1e-4.

    `dense`: as at the start, when half of all latents fire. `sparse`: biases set so that about 80
    of them do, as later in training.
    """
    torch.set_num_threads(threads)
    where = torch.device(device)

    config = TrainSaeConfig(
        architecture="relu", expansion=num_latents / d_model, batch_tokens=batch_tokens,
        lr=1e-4, lr_final=1e-5,
    )  # fmt: skip
    shape = SaeSpec(architecture="relu", d_model=d_model, num_latents=num_latents)
    table = Table(title=f"relu {d_model} -> {num_latents}, batch {batch_tokens}, {device}")
    for column in ("phase", "s a step", "tokens/s", "L0", "dense TFLOP a step"):
        table.add_column(column, justify="right")
    x = torch.randn(batch_tokens, d_model, generator=torch_generator(0, "spec"))
    trainer = SaeTrainer(shape, config, 50_000, input_statistics(x), 0, where)

    for phase in ("dense", "sparse"):
        # No run of some steps gets there by itself: the biases are set as if it had.
        if phase == "sparse":
            with torch.no_grad():
                pre_acts = (x[:256].to(where) * trainer.scale) @ trainer.weights.enc.T
                trainer.weights.b_enc.sub_(_exceeded(pre_acts, 80 / num_latents))
        seconds = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            result = trainer.step(x)  # ends with numbers on the host, so it is synchronous
            seconds.append(time.perf_counter() - started)

        median = statistics.median(seconds[1:])
        # Encoder and decoder, forward and two backward products each, none for the inputs.
        flops = 2.0 * 5 * batch_tokens * d_model * num_latents
        table.add_row(
            phase, f"{median:.2f}", f"{batch_tokens / median:,.0f}", f"{result.l0:,.0f}",
            f"{flops / 1e12:.2f}",
        )  # fmt: skip
    console.print(table)
    gib = peak_memory_bytes(where) / (1 << 30)
    console.print(f"peak memory: {gib:.1f} GiB")


@app.command()
def crossover(
    d_model: int = 576,
    num_latents: int = 5760,
    batch_tokens: int = 4096,
    shares: Annotated[
        str, typer.Option(help="Shares of latents that fire.")
    ] = "0.005,0.01,0.02,0.05,0.1,0.2",
    steps: Annotated[int, typer.Option(help="Timed steps of each way.")] = 5,
    threads: Threads = 2,
) -> None:
    """How many latents may fire for the sparse way to pay: relu, forward and gradients of all
    weights, the sparse way (whatever the share) and the dense one in turn."""
    torch.set_num_threads(threads)
    x = torch.randn(batch_tokens, d_model, generator=torch_generator(0, "crossover"))
    spec = SaeSpec(architecture="relu", d_model=d_model, num_latents=num_latents)
    trainer = SaeTrainer(
        spec, TrainSaeConfig(architecture="relu"), 100, input_statistics(x), 0, torch.device("cpu")
    )
    weights, architecture = trainer.weights, trainer.architecture

    # The sparse way must be timed also where the trainer would have left it.
    limit, architectures.DENSE_ABOVE = architectures.DENSE_ABOVE, math.inf
    table = Table(title=f"relu {d_model} -> {num_latents}, batch {batch_tokens}, {threads} threads")
    for column in ("share that fires", "sparse, ms", "dense, ms", "dense / sparse"):
        table.add_column(column, justify="right")

    for share in (float(text) for text in shares.split(",")):
        with torch.no_grad():
            weights.b_enc.zero_()
            pre_acts = (x[:256] - weights.b_dec) @ weights.enc.T
            weights.b_enc.sub_(_exceeded(pre_acts, share))

        # One more round than is counted: the first one warms up.
        seconds: dict[str, list[float]] = {"sparse": [], "dense": []}
        for _ in range(steps + 1):
            for name, way in (("sparse", autoencode), ("dense", autoencode_dense)):
                started = time.perf_counter()
                loss = (way(x, weights, architecture).levels - x[:, None]).square().mean()
                torch.autograd.grad(loss, list(weights))
                seconds[name].append(time.perf_counter() - started)

        sparse, dense = (statistics.median(values[1:]) for values in seconds.values())
        table.add_row(
            f"{share:.3f}", f"{1e3 * sparse:.0f}", f"{1e3 * dense:.0f}", f"{dense / sparse:.2f}"
        )
    console.print(table)
    console.print(f"the trainer changes to dense products above a share of {limit:g}")


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product: the median of five, on random data."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        started = clock(device)
        torch.mm(a, b)
        seconds.append(clock(device) - started)
    return 2.0 * size**3 / statistics.median(seconds[3:])


def _asked_for(name: str, only: str) -> bool:
    return any(part in name for part in only.split(","))


def _exceeded(values: Tensor, share: float) -> Tensor:
    """What a share of all values exceeds."""
    return values.flatten().kthvalue(round((1 - share) * values.numel())).values


@torch.no_grad()
def fvu(contender: Contender, x: Tensor) -> tuple[float, float]:
    """Fraction of the variance of x [N, D] that is lost, and mean active latents a token."""
    recon, active = contender.reconstruct(x)
    error = (x - recon).double().square().sum()
    return float(error / (x - x.mean(0)).double().square().sum()), float(active.float().mean())


def _recovery(contender: Contender, truth: Tensor | None) -> str:
    """Mean over true directions of the largest cosine to a decoder row."""
    if truth is None:
        return "-"
    rows = F.normalize(contender.directions(), dim=1).cpu()
    return f"{float((truth @ rows.T).amax(1).mean()):.4f}"


if __name__ == "__main__":
    app()
