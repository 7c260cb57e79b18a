"""Train the sparse autoencoder on cached residuals; publish the weights of the best held-out fvu.

In: cache_activations (splits train and validation); in streaming mode the tokens and the model
instead of its train split. Out: `sae/` (sae_lens layout), `curves.parquet`, `best.json`. Killed
and run again, it goes on from its last checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rldecoder.checkpoints import Checkpoints
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.curves import Curves
from rldecoder.data.activations import (
    ActivationReader,
    ShuffledActivations,
    read_meta,
)
from rldecoder.data.forward import ActivationPass
from rldecoder.data.shards import read_tokens
from rldecoder.data.streaming import StreamedActivations
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.drift import DriftWatch
from rldecoder.sae.training import SaeTrainer, input_statistics, published_spec
from rldecoder.schemas import write_json
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import InputArtifact, Stage, StageContext, StageOutput


def run(
    inputs: Mapping[str, InputArtifact], config: TrainSaeConfig, ctx: StageContext
) -> StageOutput:
    """Train until `budget_tokens` are consumed."""
    seed_everything(ctx.seed)
    cache = inputs["cache_activations"].path
    reader = open_train_split(inputs, config, ctx)
    validation = ActivationReader(cache, "validation")
    held_out = _sample(validation, config.eval_tokens, derive_seed(ctx.seed, "validation"))
    batch_seed = derive_seed(ctx.seed, "batches")
    num_steps = max(1, config.budget_tokens // config.batch_tokens)
    trainer = SaeTrainer(
        published_spec(
            config,
            reader.meta.d_model,
            hook_layer=reader.meta.hook_layer,
            model_name=reader.meta.model_name,
            context_length=reader.meta.context_length,
        ),
        config,
        num_steps,
        # The first rows of the first epoch: a stream has computed them by then.
        input_statistics(_sample(reader, config.init_tokens, batch_seed)),
        ctx.seed,
        ctx.device,
    )
    watch, curves = DriftWatch(config), Curves()
    checkpoints = Checkpoints(ctx.progress / "train_sae")
    checkpoint, position = checkpoints.load(), Position(0, 0)
    if checkpoint is not None:
        trainer.unpack(checkpoint.tensors, checkpoint.state["trainer"])
        watch.restore(checkpoint.state["watch"])
        curves = Curves.from_state(checkpoint.state["curves"])
        position = Position(*checkpoint.state["position"])
        if isinstance(reader, StreamedActivations):
            reader.rows_found |= dict(checkpoint.state["stream_rows"])
        ctx.report.note(f"train_sae goes on from step {trainer.step_index} of {num_steps}")

    started, first = time.perf_counter(), trainer.step_index
    batches = _batches(reader, config.batch_tokens, batch_seed, position)
    total, done = num_steps * config.batch_tokens, first * config.batch_tokens
    with ctx.report.track("SAE", total, "tokens", done) as bar:
        while trainer.step_index < num_steps:
            batch, position = next(batches)
            result = trainer.step(batch)
            step = trainer.step_index
            for message in watch.observe(step, result):
                ctx.report.alert(message)
            if step % config.log_every_steps == 0 or step == num_steps:
                curves.log(step, **result._asdict())
                ctx.report.metrics("train_sae", step, result._asdict())
            if step % config.eval_every_steps == 0 or step == num_steps:
                fvu, l0 = trainer.evaluate(held_out.split(config.batch_tokens))
                values = {"validation_fvu": fvu, "validation_l0": l0}
                curves.log(step, **values)
                ctx.report.metrics("train_sae", step, values)
            if step % config.checkpoint_every_steps == 0 and step < num_steps:
                tensors, state = trainer.pack()
                rest = {"watch": watch.state(), "curves": curves.state(), "position": position}
                if isinstance(reader, StreamedActivations):
                    rest["stream_rows"] = list(reader.rows_found.items())
                checkpoints.save(step, tensors, {"trainer": state, **rest})
            bar.advance(config.batch_tokens, f"fvu {trainer.best_fvu:.3f} mse {result.mse:.3f}")
    seconds = max(time.perf_counter() - started, 1e-9)

    trainer.sae(best=True).save(ctx.out / "sae")
    curves.write(ctx.out / "curves.parquet")
    best = {
        "split": "validation",
        "fvu": trainer.best_fvu,
        "step": trainer.best_step,
        "num_steps": num_steps,
        "tokens": total,
        "epochs": total / reader.num_tokens,
        "dead_fraction": trainer.dead_fraction,
    }
    write_json(ctx.out / "best.json", best)
    return StageOutput(
        metrics={
            "validation_fvu": trainer.best_fvu,
            "validation_l0": curves.last("validation_l0"),
            "dead_fraction": trainer.dead_fraction,
            "best_step": trainer.best_step,
            "steps": num_steps,
            "tokens": total,
            "epochs": total / reader.num_tokens,
            "tokens_per_second": (num_steps - first) * config.batch_tokens / seconds,
        }
    )


class Position(NamedTuple):
    """Where the next batch is."""

    epoch: int
    batch: int


def open_train_split(
    inputs: Mapping[str, InputArtifact], config: TrainSaeConfig, ctx: StageContext
) -> ShuffledActivations:
    """The training activations, from the cache or from the frozen model."""
    cache = inputs["cache_activations"]
    if config.source == "cache":
        return ActivationReader(cache.path, "train", window_bytes=config.window_bytes)
    meta = read_meta(cache.path)
    most = config.stream_tokens
    sequences = None if most is None else max(1, most // meta.context_length)
    lm = FrozenLM.load(inputs["sync_tokenizer"].path / "model", device=ctx.device)
    forward = ActivationPass(
        lm, meta.hook_layer, int(cache.config["micro_batch_sequences"]), ctx.report.note,
        with_final=False,
    )  # fmt: skip
    return StreamedActivations(
        meta,
        torch.from_numpy(read_tokens(inputs["ingest"].path, "train", sequences)),
        forward,
        shard_tokens=int(cache.config["shard_tokens"]),
        window_bytes=config.window_bytes,
    )


def _sample(reader: ShuffledActivations, num_tokens: int, seed: int) -> Tensor:
    """The first residuals [N, D] in a random order; fewer when the split is smaller."""
    batch = next(reader.shuffled(min(num_tokens, reader.num_tokens), seed=seed, drop_last=False))
    assert batch.resid is not None
    return batch.resid


def _batches(
    reader: ShuffledActivations, batch_tokens: int, seed: int, start: Position
) -> Iterator[tuple[Tensor, Position]]:
    """Endless [N, D] batches, one shuffled epoch after the other; each with where the next is."""
    epoch, index = start
    while True:
        for batch in reader.shuffled(batch_tokens, seed=seed, epoch=epoch, start_batch=index):
            assert batch.resid is not None
            index += 1
            yield batch.resid, Position(epoch, index)
        epoch, index = epoch + 1, 0


STAGE = Stage(
    name="train_sae",
    kind="sae",
    version=3,
    inputs=("sync_tokenizer", "ingest", "cache_activations"),
    run=run,
    phase="features",
)
