"""Run the frozen model over the tokens once and keep what it computes at one layer.

Every shard is computed on its own from the same micro-batches, so a killed run goes on with the
next shard and ends with the same files.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rldecoder.config.data import CacheActivationsConfig
from rldecoder.data.activations import (
    ActivationBatch,
    ActivationMeta,
    row_bytes,
    shard_path,
    write_activation_shard,
    write_meta,
)
from rldecoder.data.shards import SPLITS, read_tokens
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.sinks import SKIP_FIRST, is_sink
from rldecoder.schemas import read_json
from rldecoder.stages.context import InputArtifact, Stage, StageContext, StageOutput


@dataclass(frozen=True)
class Shard:
    """A run of sequences that becomes one file."""

    split: str
    index: int
    first_sequence: int
    num_sequences: int

    def max_rows(self, context_length: int) -> int:
        """Rows of the file, if no token is left out for its norm."""
        return self.num_sequences * (context_length - SKIP_FIRST)


def run(
    inputs: Mapping[str, InputArtifact], config: CacheActivationsConfig, ctx: StageContext
) -> StageOutput:
    """Publish shards of (seq_id, pos, token_id, resid, final_hidden) and meta.json."""
    model = inputs["sync_tokenizer"].path
    tokens = _read_budgets(inputs["ingest"].path, config)
    lm = FrozenLM.load(model / "model", device=ctx.device)
    if config.hook_layer > lm.num_layers:
        raise BadInputError(
            f"`cache_activations.hook_layer` is {config.hook_layer}.",
            f"The model has {lm.num_layers} blocks.",
            f"Choose a layer from 1 to {lm.num_layers}.",
        )
    context_length = next(iter(tokens.values())).shape[1]
    plan = plan_shards({name: len(ids) for name, ids in tokens.items()}, context_length, config)
    done = {shard for shard in plan if _is_complete(shard, ctx.progress, context_length)}
    todo = [shard for shard in plan if shard not in done]
    _check_disk(todo, context_length, lm.d_model, ctx.progress, config.disk_reserve_bytes)

    finished = sum(shard.num_sequences for shard in done) * context_length
    total = sum(len(ids) for ids in tokens.values()) * context_length
    forward = _Forward(lm, config.hook_layer, config.micro_batch_sequences, ctx)
    pending: Future[None] | None = None
    # One writer thread: Parquet encoding and the disk overlap the next shard's forward passes.
    with (
        ctx.report.track("cache_activations", total, unit="tokens", done=finished) as bar,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):
        for shard in todo:
            rows = slice(shard.first_sequence, shard.first_sequence + shard.num_sequences)
            parts = []
            for part in forward.batches(tokens[shard.split][rows], shard.first_sequence):
                parts.append(part)
                bar.advance(len(part.pos) * context_length / (context_length - SKIP_FIRST))
            whole = ActivationBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))
            assert whole.resid is not None
            batch = whole.select(~is_sink(whole.resid))
            if pending is not None:
                pending.result()  # raises what the write raised; at most two shards in memory
            path = shard_path(ctx.progress, shard.split, shard.index)
            pending = writer.submit(write_activation_shard, path, batch)
        if pending is not None:
            pending.result()

    for shard in plan:
        _publish(shard_path(ctx.progress, shard.split, shard.index), ctx.out)
    counts = dict.fromkeys(tokens, 0)
    for shard in plan:
        rows_kept = pq.read_metadata(shard_path(ctx.out, shard.split, shard.index)).num_rows
        counts[shard.split] += rows_kept
    possible = sum(shard.max_rows(context_length) for shard in plan)
    meta = ActivationMeta(
        model_name=str(read_json(model / "model.json")["name"]),
        hook_layer=config.hook_layer,
        num_layers=lm.num_layers,
        d_model=lm.d_model,
        vocab_size=lm.vocab_size,
        context_length=context_length,
        skip_first=SKIP_FIRST,
        tokens=counts,
    )
    write_meta(ctx.out, meta)
    return StageOutput(
        {
            **{f"tokens_{name}": count for name, count in counts.items()},
            "sink_tokens": possible - sum(counts.values()),
            "hook_layer": config.hook_layer,
            "cache_bytes": sum(path.stat().st_size for path in ctx.out.glob("*.parquet")),
            "tokens_per_second": forward.tokens_per_second,
        }
    )


def plan_shards(
    num_sequences: Mapping[str, int], context_length: int, config: CacheActivationsConfig
) -> list[Shard]:
    """Shards of about `shard_tokens`, whole sequences each, split by split."""
    per_shard = max(1, config.shard_tokens // context_length)
    return [
        Shard(split, index, first, min(per_shard, count - first))
        for split, count in num_sequences.items()
        for index, first in enumerate(range(0, count, per_shard))
    ]


class _Forward:
    """Forward passes in micro-batches that shrink when memory runs out."""

    def __init__(self, lm: FrozenLM, hook_layer: int, micro_batch: int, ctx: StageContext) -> None:
        self._lm, self._hook_layer, self._ctx = lm, hook_layer, ctx
        self.micro_batch = micro_batch
        self._num_tokens, self._seconds = 0, 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Of the forward passes of this process, first one (warm-up) included; None if none."""
        return self._num_tokens / self._seconds if self._seconds else None

    def batches(self, input_ids: Tensor, first_sequence: int) -> Iterator[ActivationBatch]:
        """Activations of sequences [B, T] int64, on the CPU in bfloat16, in order."""
        start = 0
        while start < len(input_ids):
            ids = input_ids[start : start + self.micro_batch]
            batch = self._try(ids, first_sequence + start)
            if batch is None:
                self._shrink()
                continue
            yield batch
            start += len(ids)

    def _try(self, ids: Tensor, first_sequence: int) -> ActivationBatch | None:
        """One pass over sequences [B, T]; None when memory ran out and B can shrink."""
        begun = time.perf_counter()
        try:
            resid, final = self._lm.resid_and_final(ids.to(self._ctx.device), self._hook_layer)
            batch = _rows(ids, resid, final, first_sequence)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.micro_batch > 1:
                return None
            raise NoResourceError(
                "Memory ran out on a single sequence.",
                f"{type(error).__name__}: {error}",
                "Lower `ingest.context_length`, or use a device with more memory.",
            ) from error
        self._seconds += time.perf_counter() - begun
        self._num_tokens += ids.numel()
        return batch

    def _shrink(self) -> None:
        self.micro_batch //= 2
        if self._ctx.device.type == "cuda":
            torch.cuda.empty_cache()
        self._ctx.report.note(f"Memory ran out; going on with {self.micro_batch} sequences a pass.")


def _rows(ids: Tensor, resid: Tensor, final: Tensor, first_sequence: int) -> ActivationBatch:
    """Flatten [B, T, D] to rows without the skipped positions."""
    num_sequences, length = ids.shape
    kept = length - SKIP_FIRST
    sequences = torch.arange(first_sequence, first_sequence + num_sequences)
    return ActivationBatch(
        sequences.repeat_interleave(kept),
        torch.arange(SKIP_FIRST, length).repeat(num_sequences),
        ids[:, SKIP_FIRST:].reshape(-1),
        resid[:, SKIP_FIRST:].reshape(-1, resid.shape[-1]).to("cpu", torch.bfloat16),
        final[:, SKIP_FIRST:].reshape(-1, final.shape[-1]).to("cpu", torch.bfloat16),
    )


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises a plain RuntimeError when the CPU's allocator fails.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "not enough memory" in str(error) or "can't allocate memory" in str(error)
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


def _is_complete(shard: Shard, folder: Path, context_length: int) -> bool:
    """Whether an earlier, interrupted run wrote this shard (files appear by rename only)."""
    path = shard_path(folder, shard.split, shard.index)
    try:
        return 0 < int(pq.read_metadata(path).num_rows) <= shard.max_rows(context_length)
    except (OSError, pa.ArrowException):
        return False


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


STAGE = Stage(
    name="cache_activations",
    kind="activations",
    version=2,
    inputs=("sync_tokenizer", "ingest"),
    run=run,
    phase="features",
)
