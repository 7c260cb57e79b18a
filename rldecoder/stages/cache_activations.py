"""Run the frozen model over the tokens once and keep what it computes at one layer.

Every shard is computed on its own from the same micro-batches, so a killed run goes on with the
next shard and ends with the same files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from rldecoder.artifacts.catalogue import ModelFolder
from rldecoder.config.data import CacheActivationsConfig
from rldecoder.data.activations import (
    ActivationBatch,
    ActivationMeta,
    row_bytes,
    shard_path,
    write_activation_shard,
    write_meta,
)
from rldecoder.data.forward import PassSettings, PassWorker, plan_shards
from rldecoder.data.shards import SPLITS, SplitSequences
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.executors.jobs import Measured
from rldecoder.lm.proof import prove
from rldecoder.lm.sinks import SKIP_FIRST
from rldecoder.reporting import Note
from rldecoder.schemas import count_rows
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import TextInputs


def run(inputs: TextInputs, config: CacheActivationsConfig, ctx: StageContext) -> Output:
    """Publish shards of (seq_id, pos, token_id, resid, final_hidden), and what they are."""
    budgets = _read_budgets(inputs.corpus.folder, config)
    length = next(iter(budgets.values())).length
    plan = plan_shards(
        {name: budget.num_sequences for name, budget in budgets.items()},
        length,
        config.shard_tokens,
    )

    # What a worker needs to compute any shard of the plan, in this process or in another.
    settings = PassSettings(
        model=inputs.model.model.absolute(),
        record=ModelFolder.record.path(inputs.model.folder).absolute(),
        corpus=inputs.corpus.folder.absolute(),
        hook_layer=config.hook_layer,
        micro_batch=config.micro_batch_sequences,
        plan=tuple(plan),
    )
    job = ctx.shards.job(CacheWorker, settings, [inputs.model.folder, inputs.corpus.folder])

    # What an earlier, interrupted run wrote is kept; disk is needed for the rest.
    todo = job.unfinished(ctx.report.note)
    total = sum(shard.size for shard in job.files)
    finished = total - sum(job.files[number].size for number in todo)
    with ctx.executor.open(job, device=ctx.device, report=ctx.report) as crew:
        model = crew.facts
        rows = sum(plan[number].max_rows(length) for number in todo)
        _check_disk(rows, model["d_model"], ctx.progress, config.disk_reserve_bytes)
        with ctx.report.track("cache_activations", total, unit="tokens", done=finished) as bar:
            spent = crew.run(todo, bar)

    for number in range(len(plan)):
        _publish(job.path(number), ctx.out)
    kept = dict.fromkeys(budgets, 0)
    for shard in plan:
        kept[shard.split] += count_rows(shard_path(ctx.out, shard.split, shard.index))
    possible = sum(shard.max_rows(length) for shard in plan)
    meta = ActivationMeta(
        model_name=inputs.model.record.name, hook_layer=config.hook_layer,
        num_layers=model["num_layers"], d_model=model["d_model"], vocab_size=model["vocab_size"],
        context_length=length, skip_first=SKIP_FIRST, tokens=kept,
    )  # fmt: skip
    write_meta(ctx.out, meta)
    return Output(
        {
            **{f"tokens_{name}": count for name, count in kept.items()},
            "sink_tokens": possible - sum(kept.values()),
            "hook_layer": config.hook_layer,
            "cache_bytes": sum(path.stat().st_size for path in ctx.out.glob("*.parquet")),
            # Of one worker, first passes (warm-up) included; None where all was there already.
            "tokens_per_second": spent["tokens"] / spent["seconds"] if todo else None,
        }
    )


class CacheWorker(PassWorker):
    """Its rows go into the cache."""

    def __init__(self, settings: PassSettings, device: torch.device, note: Note) -> None:
        super().__init__(settings, device, note)
        if settings.hook_layer > self.lm.num_layers:
            raise BadInputError(
                f"`cache_activations.hook_layer` is {settings.hook_layer}.",
                f"The model has {self.lm.num_layers} blocks.",
                f"Choose a layer from 1 to {self.lm.num_layers}.",
            )
        # Every later stage cuts the model here.
        prove(self.lm, hook_layer=settings.hook_layer)

    def facts(self) -> Mapping[str, int]:
        """What `ActivationMeta` says of the model."""
        lm = self.lm
        return {
            "num_layers": lm.num_layers, "d_model": lm.d_model, "vocab_size": lm.vocab_size,
        }  # fmt: skip

    def measured(self) -> Measured:
        """Tokens through the model, and the seconds that they took."""
        return {"tokens": self.forward.num_tokens, "seconds": self.forward.seconds}

    def write(self, path: Path, result: ActivationBatch) -> str:
        """See `write_activation_shard`."""
        return write_activation_shard(path, result)


class _Budget(NamedTuple):
    """Of one split."""

    num_sequences: int
    length: int


def _read_budgets(folder: Path, config: CacheActivationsConfig) -> dict[str, _Budget]:
    """Sequences to read of every split with a budget and with text."""
    budgets = {}
    for name in SPLITS:
        tokens = getattr(config.budget_tokens, name)
        if tokens == 0 or not any(folder.glob(f"{name}-*.parquet")):
            continue
        text = SplitSequences(folder, name)
        if tokens < text.length:
            raise BadInputError(
                f"`cache_activations.budget_tokens.{name}` is {tokens}.",
                f"One sequence has {text.length} tokens.",
                f"Set it to {text.length} or more, or to 0 to leave the split out.",
            )
        budgets[name] = _Budget(min(tokens // text.length, text.num_sequences), text.length)
    if "train" not in budgets:
        raise BadInputError(
            "There are no tokens to train on.",
            "Split `train` has no budget here, or no text in `ingest`.",
            "Raise `cache_activations.budget_tokens.train` and `ingest.budget_tokens.train`.",
        )
    return budgets


def _check_disk(num_rows: int, d_model: int, folder: Path, reserve: int) -> None:
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
