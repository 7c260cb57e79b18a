"""The feature decoder: training against a plain dense implementation, generation against the base.

    python -m benchmarks.bench_decoder train
    python -m benchmarks.bench_decoder memory
    python -m benchmarks.bench_decoder generate

The frozen model has SmolLM2-135M's shape and random weights (nothing is fetched), the SAE 5,760
random latents, k 64. Contenders take turns on the same batches. Results: docs/results.md.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rldecoder.config.decoder import DistillConfig, MatmulPrecision
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch, ActivationMeta, ActivationWriter
from rldecoder.decoder.blocks import evenly_spaced
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.decoder.training import DecoderTrainer
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.random_model import make_random_model
from rldecoder.provenance import peak_memory_bytes
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.seeds import torch_generator

app = typer.Typer(help=__doc__, no_args_is_help=True)
console = Console(width=120)

VOCAB, WIDTH, LAYERS, LENGTH, LATENTS, K = 49_152, 576, 30, 256, 5760, 64
Threads = Annotated[int, typer.Option(help="Threads of torch.")]
Layer = Annotated[int, typer.Option(help="Hook layer, of 30.")]
Depth = Annotated[int, typer.Option(help="Blocks of the decoder; 0: linear.")]


def frozen_model(folder: Path, dtype: torch.dtype) -> FrozenLM:
    """SmolLM2-135M's shape, random."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(make_random_model(folder, architecture="llama"))
    return FrozenLM(model, tokenizer, folder)


def make_decoder(lm: FrozenLM, layer: int, depth: int) -> SaeDecoderForCausalLM:
    """A decoder of the frozen model's own blocks."""
    sae = Sae.random_init(
        SaeSpec(d_model=WIDTH, num_latents=LATENTS, k=K, hook_layer=layer), seed=1
    )
    decoder = new_decoder(lm, sae, evenly_spaced(layer, LAYERS, depth) if depth else [])
    if decoder.blocks is not None:
        decoder.blocks.copy_from(lm.base)
    return decoder


def random_cache(folder: Path, layer: int, tokens: int) -> ActivationReader:
    """Rows of normal numbers: the work does not depend on what they say."""
    meta = ActivationMeta(
        model_name="random", hook_layer=layer, num_layers=LAYERS, d_model=WIDTH, vocab_size=VOCAB,
        context_length=LENGTH,
    )  # fmt: skip
    count = -(-tokens // (LENGTH - 1))
    generator = torch_generator(0, "cache")
    grid = torch.meshgrid(torch.arange(count), torch.arange(1, LENGTH), indexing="ij")
    rows = count * (LENGTH - 1)
    with ActivationWriter(folder, "train", meta, rows + 1) as writer:
        writer.add(
            grid[0].flatten(), grid[1].flatten(),
            torch.randint(VOCAB, (rows,), generator=generator),
            torch.randn(rows, WIDTH, generator=generator),
            torch.randn(rows, WIDTH, generator=generator),
        )  # fmt: skip
    return ActivationReader(folder, "train")


class Plain:
    """The same model and loss as one writes them first: dense latents, all logits at once."""

    def __init__(self, decoder: SaeDecoderForCausalLM, trainer: DecoderTrainer) -> None:
        self.decoder, self.labels = decoder, trainer.next_tokens
        self.unembedding = decoder.frozen.lm.unembedding.float()
        self.optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-5)

    def step(self, batch: ActivationBatch) -> float:
        """One optimiser step; the loss."""
        assert batch.resid is not None
        assert batch.final_hidden is not None
        decoder = self.decoder
        with torch.no_grad():
            dense = decoder.frozen.sae.encode_dense(batch.resid.float())
        resid = dense @ decoder.W + decoder.b
        if decoder.blocks is None:
            hidden = resid
        else:
            _, row = torch.unique_consecutive(batch.seq_id, return_inverse=True)
            grid = resid.new_zeros(int(row[-1]) + 1, LENGTH, WIDTH)
            grid[row, batch.pos] = resid
            hidden = decoder.blocks(grid)[row, batch.pos]
        student = F.log_softmax(hidden @ self.unembedding.T, dim=-1)
        teacher = F.log_softmax(batch.final_hidden.float() @ self.unembedding.T, dim=-1)
        kl = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        labels = self.labels.labels(batch.seq_id, batch.pos)
        loss = 0.9 * kl + 0.1 * F.nll_loss(student, labels, ignore_index=-100)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())


@app.command()
def train(
    layer: Layer = 24,
    depth: Depth = 0,
    batch_tokens: int = 1024,
    steps: Annotated[int, typer.Option(help="Timed steps of each contender.")] = 7,
    threads: Threads = 2,
) -> None:
    """Median time of a training step, ours in both precisions and the plain one, in turn."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        lm = frozen_model(Path(folder) / "model", torch.bfloat16)
        reader = random_cache(Path(folder) / "cache", layer, batch_tokens * (steps + 2) + LENGTH)
        contenders: dict[str, Callable[[ActivationBatch], Any]] = {}
        precisions: dict[str, MatmulPrecision] = {
            "bfloat16 factors": "medium",
            "float32": "highest",
        }
        for name, precision in precisions.items():
            config = DistillConfig(
                epochs=1, budget_tokens=None, batch_tokens=batch_tokens,
                matmul_precision=precision,
            )  # fmt: skip
            trainer = DecoderTrainer(make_decoder(lm, layer, depth), reader, config, 0)
            contenders[f"rldecoder, {name}"] = trainer.step
        contenders["plain dense, float32"] = Plain(make_decoder(lm, layer, depth), trainer).step

        batches = list(trainer.rest_of_epoch())[: steps + 2]
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for index, batch in enumerate(batches):
            for name, step in contenders.items():
                started = time.perf_counter()
                step(batch)
                if index >= 2:  # warm-up
                    seconds[name].append(time.perf_counter() - started)

    plain = statistics.median(seconds["plain dense, float32"])
    table = Table(title=f"layer {layer}, depth {depth}, batch {batch_tokens}, {threads} threads")
    for column in ("trainer", "ms a step", "tokens/s", "x plain"):
        table.add_column(column, justify="left" if column == "trainer" else "right")
    for name, values in seconds.items():
        median = statistics.median(values)
        speed = statistics.mean(len(b.pos) for b in batches) / median
        table.add_row(name, f"{1e3 * median:.0f}", f"{speed:,.0f}", f"{plain / median:.2f}")
    console.print(table)


def _peak(layer: int, depth: int, batch_tokens: int, plain: bool, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        lm = frozen_model(Path(folder) / "model", torch.bfloat16)
        reader = random_cache(Path(folder) / "cache", layer, batch_tokens + LENGTH)
        config = DistillConfig(epochs=1, budget_tokens=None, batch_tokens=batch_tokens)
        trainer = DecoderTrainer(make_decoder(lm, layer, depth), reader, config, 0)
        step: Callable[[ActivationBatch], Any] = trainer.step
        if plain:
            step = Plain(trainer.decoder, trainer).step
        batch = next(trainer.rest_of_epoch())
        before = peak_memory_bytes(torch.device("cpu"))
        step(batch)
        step(batch)
        pipe.send((before, peak_memory_bytes(torch.device("cpu"))))


@app.command()
def memory(
    layer: Layer = 24,
    depth: Depth = 0,
    batches: Annotated[str, typer.Option(help="Tokens a step.")] = "1024,4096,16384",
    plain: Annotated[bool, typer.Option(help="Of the plain implementation.")] = False,
    threads: Threads = 2,
) -> None:
    """Peak memory of a process that trains, for several batch sizes, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    for batch_tokens in (int(text) for text in batches.split(",")):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(
            target=_peak, args=(layer, depth, batch_tokens, plain, threads, send)
        )
        process.start()
        send.close()
        try:
            before, after = (value / (1 << 30) for value in receive.recv())
        except EOFError:
            raise SystemExit(f"The process for batch {batch_tokens} died; out of memory?") from None
        process.join()
        console.print(
            f"batch {batch_tokens:,}: {after:.2f} GiB at most, {before:.2f} before the first step"
        )


@app.command()
def generate(
    layer: Layer = 24,
    depths: Annotated[str, typer.Option(help="Blocks of the decoders.")] = "0,2,6",
    batch: int = 8,
    prompt: int = 64,
    new: int = 32,
    turns: int = 5,
    threads: Threads = 2,
) -> None:
    """Tokens/s of the decoder's `generate` and of the frozen model's, same batch, in turn."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        lm = frozen_model(Path(folder) / "model", torch.bfloat16)
        models: dict[str, Any] = {"frozen model": lm.model}
        for depth in (int(text) for text in depths.split(",")):
            models[f"decoder, {depth} blocks"] = make_decoder(lm, layer, depth)
        ids = torch.randint(3, VOCAB, (batch, prompt), generator=torch_generator(0, "prompt"))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(turns + 1):
            for name, model in models.items():
                started = time.perf_counter()
                _generate(model, ids, new)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    frozen = statistics.median(seconds["frozen model"])
    for name, values in seconds.items():
        median = statistics.median(values)
        console.print(
            f"{name}: {batch * new / median:,.0f} tokens/s, {frozen / median:.2f} of the frozen one"
        )


@torch.no_grad()
def _generate(model: Any, ids: Tensor, new: int) -> None:
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False,
        min_new_tokens=new, max_new_tokens=new, pad_token_id=2,
    )  # fmt: skip
    assert out.shape[1] == ids.shape[1] + new


if __name__ == "__main__":
    app()
