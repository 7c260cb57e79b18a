"""The training split through the frozen model as it is read: for budgets that no disk holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rldecoder.artifacts.catalogue import ActivationCache, Corpus, ModelFolder
from rldecoder.data.activations import VectorColumn
from rldecoder.data.forward import ActivationPass, PassSettings, plan_shards
from rldecoder.data.shards import SplitSequences
from rldecoder.data.stream_shards import (
    ModelElsewhere,
    ModelShared,
    Peers,
    StreamWorker,
    TextStreamWorker,
)
from rldecoder.data.streaming import ModelHere, ShardSource, StreamedActivations
from rldecoder.lm.frozen import FrozenLM
from rldecoder.stages.context import StageContext


@contextmanager
def open_stream(
    model: ModelFolder,
    corpus: Corpus,
    cache: ActivationCache,
    ctx: StageContext,
    *,
    columns: Sequence[VectorColumn],
    window_bytes: int,
    max_tokens: int | None = None,
    lm: FrozenLM | None = None,
    peers: Peers | None = None,
) -> Iterator[StreamedActivations]:
    """The train split's activations, in the shards and micro-batches of the cache: same numbers.

    They are computed here, by `peers` together, or, a window ahead, on a cluster.

    Args:
        cache: says how; its training split may be smaller, and is not read.
        columns: `resid`, or that and `final_hidden`, for which the whole model runs.
        window_bytes: rows that are shuffled together occupy at most this much memory.
        max_tokens: of the split's first ones; None: all.
        lm: the model, where this process has it already.
        peers: processes that share the work, if there are several.
    """
    meta, sequences = cache.meta, SplitSequences(corpus.folder, "train")
    count = sequences.num_sequences
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // meta.context_length))
    plan = plan_shards({"train": count}, meta.context_length, int(cache.config["shard_tokens"]))
    micro_batch = int(cache.config["micro_batch_sequences"])
    with_final = "final_hidden" in columns

    with ExitStack() as stack:
        source: ShardSource
        if peers is None and ctx.executor.is_here:
            here = lm or model.load(ctx.device)
            forward = ActivationPass(
                here, meta.hook_layer, micro_batch, ctx.report.note, with_final=with_final
            )
            source = ModelHere(forward, sequences)
        else:
            settings = PassSettings(
                model=model.model.absolute(),
                record=ModelFolder.record.path(model.folder).absolute(),
                corpus=corpus.folder.absolute(),
                hook_layer=meta.hook_layer,
                micro_batch=micro_batch,
                plan=tuple(plan),
                suffix=".safetensors",
            )
            worker = TextStreamWorker if with_final else StreamWorker
            job = ctx.shards.job(worker, settings, [model.folder, corpus.folder], "stream")
            if peers is not None:
                source = stack.enter_context(ModelShared.opened(job, peers, ctx.device, ctx.report))
            else:
                opened = ctx.executor.open(job, device=ctx.device, report=ctx.report)
                source = ModelElsewhere(stack.enter_context(opened), job, ctx.report.note)

        @contextmanager
        def progress(num_tokens: int) -> Iterator[Callable[[float], None]]:
            with ctx.report.track("frozen model", num_tokens, "tokens") as bar:
                yield bar.advance

        reader = StreamedActivations(
            meta, plan, source, columns=columns, window_bytes=window_bytes, progress=progress
        )
        stack.callback(reader.close)
        yield reader
