"""Rollouts for PPO: the decoder's sampler against `generate` on the frozen model and scoring apart.

    python -m benchmarks.bench_rollout
    python -m benchmarks.bench_rollout --depths 6 --model artifacts/sync_tokenizer/<digest>/model

Both sides end with the same things for every response token: the token, the latents' prediction of
its log-probability and the frozen model's. Ours runs every frozen block and the SAE once a token,
the prompts' common prefix once for all turns (the warm-up reads it), and keeps the latents for the
inner epochs; the other side does what one writes first: `generate` on the whole frozen model, then
one forward of the decoder and one of the frozen model over prompt and response. Contenders take
turns on the same batches. Without `--model` the frozen model has SmolLM2-135M's shape and random
weights. Results: docs/results.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.bench_decoder import frozen_model, make_decoder
from benchmarks.timing import clock
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.prompts import TaskPrompt, make_prompts
from rldecoder.lm.frozen import FrozenLM
from rldecoder.precision import fast_dtype
from rldecoder.rl.policy import token_stats
from rldecoder.rl.rollout import DecoderSampler
from rldecoder.rl.states import predict
from rldecoder.seeds import torch_generator

app = typer.Typer(help=__doc__)
console = Console(width=120)


class Stopwatch:
    """Seconds spent in methods of objects, by name; an inner method's time is its own.

    On a GPU it waits for the device at each border, so it is used in turns of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)
        self._inner: list[float] = []
        self._watched: list[tuple[Any, str]] = []

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count the time of `owner.method` as `name`."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = clock(self.device)
            found = call(*args, **kwargs)
            spent = clock(self.device) - started
            self.seconds[name] += spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent
            return found

        setattr(owner, method, timed)
        self._watched.append((owner, method))

    def unwatch(self) -> None:
        """Give the objects their own methods back."""
        for owner, method in self._watched:
            delattr(owner, method)
        self._watched.clear()


@torch.no_grad()
def ours(sampler: DecoderSampler, prompts: list[TaskPrompt], seed: int) -> int:
    """A rollout and its scores, as a PPO step makes them; the number of response tokens."""
    decoder = sampler.decoder
    lm = decoder.frozen.lm
    rollout = sampler(prompts, torch_generator(seed, "rollout"))
    keep = rollout.mask.bool()
    assert rollout.frozen_hidden is not None
    frozen = lm.unembed(rollout.frozen_hidden[keep]).log_softmax(-1)
    hidden = predict(decoder, rollout, torch.arange(len(prompts), device=keep.device)).hidden
    stats = token_stats(hidden, rollout.token_ids[keep], lm.unembed, frozen_logprobs=frozen)
    assert torch.isfinite(stats.logprobs).all()
    return int(keep.sum())


@torch.no_grad()
def plain(
    decoder: SaeDecoderForCausalLM, prompts: list[TaskPrompt], stops: Tensor, seed: int
) -> int:
    """The same by `generate` on the frozen model and two scoring passes, a task at a time."""
    torch.manual_seed(seed)
    lm, tokenizer = decoder.frozen.lm, decoder.frozen.lm.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = lm.pad_token_id
    count = 0

    # A task at a time, as `max_new_tokens` is the task's.
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        asked = [prompt for prompt in prompts if prompt.task == task]
        texts = [prompt.prompt for prompt in asked]
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(lm.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        model: Any = lm.model
        full = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=asked[0].max_new_tokens, eos_token_id=stops.tolist(),
            pad_token_id=lm.pad_token_id,
        )  # fmt: skip

        # `generate` pads what has ended; the stop token itself still counts.
        response = full[:, ids.shape[1] :]
        ended = torch.isin(response, stops).cumsum(-1)
        keep = (ended - torch.isin(response, stops).long()) == 0
        seen = torch.cat([mask, keep.long()], dim=1)
        last = response.shape[1] + 1

        # PPO wants the log-probabilities of both models, which sampling does not keep.
        for scorer in (decoder, model):
            logits = scorer(full, attention_mask=seen, use_cache=False, logits_to_keep=last).logits
            logprobs = logits[:, :-1].float().log_softmax(-1)
            chosen = logprobs.gather(-1, response[..., None])[..., 0]
            assert torch.isfinite(chosen[keep]).all()
        count += int(keep.sum())
    return count


def shares(sampler: DecoderSampler, run: Callable[[], Any]) -> dict[str, float]:
    """Parts of the time of one rollout with its scores; they sum to 1."""
    decoder = sampler.decoder
    lm, sae = decoder.frozen.lm, decoder.frozen.sae
    stopwatch = Stopwatch(lm.device)
    stopwatch.watch(lm, "trunk", "trunk")
    stopwatch.watch(sae, "encode", "SAE")
    stopwatch.watch(decoder, "hidden", "decoder")
    stopwatch.watch(lm, "unembed", "unembedding")
    stopwatch.watch(lm, "tail", "later blocks, once")
    if decoder.blocks is not None:
        stopwatch.watch(decoder.blocks, "forward", "decoder")
    try:
        started = time.perf_counter()
        run()
        total = time.perf_counter() - started
    finally:
        stopwatch.unwatch()
    found = {name: seconds / total for name, seconds in stopwatch.seconds.items()}
    return found | {"sampling and the rest": 1 - sum(found.values())}


@app.command()
def rollout(
    layer: Annotated[int, typer.Option(help="Hook layer.")] = 24,
    depths: Annotated[str, typer.Option(help="Blocks of the decoders; 0: linear.")] = "0,6",
    batch: Annotated[int, typer.Option(help="Prompts, half addition and half cloze.")] = 32,
    turns: Annotated[int, typer.Option(help="Timed turns of each contender.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    model: Annotated[Path | None, typer.Option(help="A folder that `sync_tokenizer` made.")] = None,
) -> None:
    """Median time of a batch of rollouts with its log-probabilities, and where ours goes."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = fast_dtype("bfloat16", device)
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            lm = frozen_model(Path(folder) / "model", dtype)
        else:
            lm = FrozenLM.load(model, dtype=dtype)
        nn.Module.to(lm.model, device)

        prompts = [
            prompt
            for task in ("addition", "cloze")
            for prompt in make_prompts(task, "train", batch // 2, seed=0)
        ]
        lengths = [len(lm.tokenizer(prompt.prompt)["input_ids"]) for prompt in prompts]
        console.print(
            f"layer {layer}, {batch} prompts of {min(lengths)} to {max(lengths)} tokens, "
            f"{lm.device}, {dtype}, {threads} threads"
        )

        table = Table()
        for column in ("blocks", "ms ours", "ms plain", "rollout tokens/s ours", "plain", "ratio"):
            table.add_column(column, justify="right")
        parts = []
        for depth in (int(text) for text in depths.split(",")):
            decoder = make_decoder(lm, layer, depth)
            nn.Module.to(decoder, lm.device)
            sampler = DecoderSampler(decoder)
            contenders: dict[str, Callable[[int], int]] = {
                "ours": partial(ours, sampler, prompts),
                "plain": partial(plain, decoder, prompts, sampler.stop_ids),
            }

            # In turn: what else the machine does slows both alike.
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            speeds: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(turns + 1):
                for name, run in contenders.items():
                    started = time.perf_counter()
                    count = run(turn)
                    spent = time.perf_counter() - started
                    if turn:  # warm-up
                        seconds[name].append(spent)
                        speeds[name].append(count / spent)

            medians = {name: statistics.median(values) for name, values in seconds.items()}
            rates = {name: statistics.median(values) for name, values in speeds.items()}
            table.add_row(
                str(depth), *(f"{1e3 * medians[name]:,.0f}" for name in contenders),
                *(f"{rates[name]:,.0f}" for name in contenders),
                f"{rates['ours'] / rates['plain']:.2f}",
            )  # fmt: skip
            found = shares(sampler, partial(ours, sampler, prompts, turns))
            listed = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
            parts.append(f"{depth} blocks, parts of our time: {listed}")
    console.print(table)
    for line in parts:
        console.print(line)


if __name__ == "__main__":
    app()
