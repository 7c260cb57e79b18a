"""Run the frozen model over the tokens once and keep what it computes at one layer.

Every shard is computed on its own from the same micro-batches, so a killed run goes on with the
next shard and ends with the same files.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from rldecoder import sealed
from rldecoder.config.data import CacheActivationsConfig
from rldecoder.data.activations import (
    ActivationBatch,
    ActivationMeta,
    row_bytes,
    shard_path,
    write_activation_shard,
    write_meta,
)
from rldecoder.data.forward import ActivationPass, Shard, plan_shards
from rldecoder.data.shards import SPLITS, read_tokens
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.lm.proof import prove
from rldecoder.lm.sinks import SKIP_FIRST
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import TextInputs


def run(inputs: TextInputs, config: CacheActivationsConfig, ctx: StageContext) -> Output:
    """Publish shards of (seq_id, pos, token_id, resid, final_hidden), and what they are."""
    tokens = _read_budgets(inputs.corpus.folder, config)
    lm = inputs.model.load(ctx.device)
    if config.hook_layer > lm.num_layers:
        raise BadInputError(
            f"`cache_activations.hook_layer` is {config.hook_layer}.",
            f"The model has {lm.num_layers} blocks.",
            f"Choose a layer from 1 to {lm.num_layers}.",
        )
    prove(lm, hook_layer=config.hook_layer)  # every later stage cuts the model here

    # What an earlier, interrupted run wrote is kept; disk is needed for the rest.
    context_length = next(iter(tokens.values())).shape[1]
    counts = {name: len(ids) for name, ids in tokens.items()}
    plan = plan_shards(counts, context_length, config.shard_tokens)
    done = {shard for shard in plan if _is_complete(shard, ctx)}
    todo = [shard for shard in plan if shard not in done]
    _check_disk(todo, context_length, lm.d_model, ctx.progress, config.disk_reserve_bytes)

    finished = sum(shard.num_sequences for shard in done) * context_length
    total = sum(len(ids) for ids in tokens.values()) * context_length
    forward = ActivationPass(lm, config.hook_layer, config.micro_batch_sequences, ctx.report.note)
    pending: Future[None] | None = None
    # One writer thread: Parquet encoding and the disk overlap the next shard's forward passes.
    with (
        ctx.report.track("cache_activations", total, unit="tokens", done=finished) as bar,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):
        for shard in todo:
            rows = slice(shard.first_sequence, shard.first_sequence + shard.num_sequences)
            batch = forward.shard(tokens[shard.split][rows], shard.first_sequence, bar.advance)
            if pending is not None:
                pending.result()  # raises what the write raised; at most two shards in memory
            path = shard_path(ctx.progress, shard.split, shard.index)
            pending = writer.submit(_write, path, batch, f"{ctx.owner} {path.name}")
        if pending is not None:
            pending.result()

    for shard in plan:
        _publish(shard_path(ctx.progress, shard.split, shard.index), ctx.out)
    kept = dict.fromkeys(tokens, 0)
    for shard in plan:
        path = shard_path(ctx.out, shard.split, shard.index)
        kept[shard.split] += pq.read_metadata(path).num_rows
    possible = sum(shard.max_rows(context_length) for shard in plan)
    meta = ActivationMeta(
        model_name=inputs.model.record.name,
        hook_layer=config.hook_layer,
        num_layers=lm.num_layers,
        d_model=lm.d_model,
        vocab_size=lm.vocab_size,
        context_length=context_length,
        skip_first=SKIP_FIRST,
        tokens=kept,
    )
    write_meta(ctx.out, meta)
    return Output(
        {
            **{f"tokens_{name}": count for name, count in kept.items()},
            "sink_tokens": possible - sum(kept.values()),
            "hook_layer": config.hook_layer,
            "cache_bytes": sum(path.stat().st_size for path in ctx.out.glob("*.parquet")),
            "tokens_per_second": forward.tokens_per_second,
        }
    )


def _read_budgets(folder: Path, config: CacheActivationsConfig) -> dict[str, Tensor]:
    """Sequences [S, T] of every split with a budget and with text."""
    tokens = {}
    for name in SPLITS:
        budget = getattr(config.budget_tokens, name)
        if budget == 0 or not any(folder.glob(f"{name}-*.parquet")):
            continue
        length = read_tokens(folder, name, 1).shape[1]
        if budget < length:
            raise BadInputError(
                f"`cache_activations.budget_tokens.{name}` is {budget}.",
                f"One sequence has {length} tokens.",
                f"Set it to {length} or more, or to 0 to leave the split out.",
            )
        tokens[name] = torch.from_numpy(read_tokens(folder, name, budget // length))
    if "train" not in tokens:
        raise BadInputError(
            "There are no tokens to train on.",
            "Split `train` has no budget here, or no text in `ingest`.",
            "Raise `cache_activations.budget_tokens.train` and `ingest.budget_tokens.train`.",
        )
    return tokens


def _write(path: Path, batch: ActivationBatch, owner: str) -> None:
    sealed.seal_file(path, owner=owner, sha256=write_activation_shard(path, batch))


def _is_complete(shard: Shard, ctx: StageContext) -> bool:
    """Whether an earlier, interrupted run wrote this shard, and nothing changed it since."""
    path = shard_path(ctx.progress, shard.split, shard.index)
    return sealed.is_intact(path, owner=f"{ctx.owner} {path.name}", note=ctx.report.note)


def _check_disk(
    todo: list[Shard], context_length: int, d_model: int, folder: Path, reserve: int
) -> None:
    num_rows = sum(shard.max_rows(context_length) for shard in todo)
    need = num_rows * row_bytes(d_model)
    free = shutil.disk_usage(folder).free
    if need + reserve > free:
        raise NoResourceError(
            f"The activation cache needs {need / 1e9:,.2f} GB on disk and {reserve / 1e9:,.2f} GB "
            f"to spare; {free / 1e9:,.2f} GB are free at {folder}.",
            f"{num_rows:,} tokens take {row_bytes(d_model):,} bytes each.",
            "Lower `cache_activations.budget_tokens`, or put `store` on a larger disk.",
        )


def _publish(path: Path, folder: Path) -> None:
    """Hard-link a shard into the artifact: no second copy, and the progress stays whole until the
    artifact is published. File systems without links get a move."""
    try:
        os.link(path, folder / path.name)
    except OSError:
        shutil.move(path, folder / path.name)
