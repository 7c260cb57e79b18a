"""Tiny inputs for the interpretation stages, and a way to run one stage on another's output."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import (
    ActivationCache,
    Corpus,
    FinalDecoder,
    ModelFolder,
    TrainedSae,
)
from rldecoder.data.activations import ActivationWriter
from rldecoder.data.shards import write_token_shard
from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.reporting import SilentReporter
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.stages.context import Output, Stage, StageContext
from tests.stages.published import published
from tests.tiny_models import cache_meta

HOOK_LAYER = 2
LENGTH = 48
NUM_SEQUENCES = 24
NUM_LATENTS = 96
DOCUMENT_TOKENS = 120
SPLITS = ("label", "test", "ood")

Folders = dict[str, Path]
"""Of artifacts, by stage."""


def make_inputs(folder: Path, model_folder: Path) -> Folders:
    """Model, tokens of real English, cache, random SAE and random decoder, as artifacts."""
    kinds = (ModelFolder, Corpus, ActivationCache, TrainedSae, FinalDecoder)
    made = {kind.stage: folder / kind.stage for kind in kinds}
    shutil.copytree(model_folder, ModelFolder.model.path(made[ModelFolder.stage]))
    lm = published(ModelFolder, made[ModelFolder.stage]).load()
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = np.array(lm.tokenizer(text[:60_000], verbose=False)["input_ids"])
    meta = cache_meta(lm, HOOK_LAYER, LENGTH)
    size = NUM_SEQUENCES * LENGTH
    for number, split in enumerate(SPLITS):
        tokens = ids[number * size : (number + 1) * size].reshape(NUM_SEQUENCES, LENGTH)
        docs = np.arange(size).reshape(NUM_SEQUENCES, LENGTH) // DOCUMENT_TOKENS + 100 * number
        write_tokens(made[Corpus.stage], split, tokens, docs, lm.vocab_size)
        resid, final = lm.resid_and_final(torch.from_numpy(tokens), HOOK_LAYER)
        cache = made[ActivationCache.stage]
        with ActivationWriter(cache, split, meta, shard_rows=500) as writer:
            for row in range(NUM_SEQUENCES):
                writer.add(
                    torch.full((LENGTH - 1,), row),
                    torch.arange(1, LENGTH),
                    torch.from_numpy(tokens[row, 1:]),
                    resid[row, 1:],
                    final[row, 1:],
                )
    spec = SaeSpec(d_model=lm.d_model, num_latents=NUM_LATENTS, k=8, hook_layer=HOOK_LAYER)
    sae = Sae.random_init(spec, seed=1)
    sae.save(TrainedSae.sae.path(made[TrainedSae.stage]))
    torch.manual_seed(0)
    decoder = new_decoder(lm, sae).requires_grad_(False)
    decoder.W.mul_(10)
    decoder.save_pretrained(FinalDecoder.decoder.path(made[FinalDecoder.stage]))
    return made


def inputs_of(stage: Stage, folders: Folders) -> Any:
    """What a stage reads, as the runner would hand it over; a digest is its stage's name."""

    def opened(kind: type[Artifact]) -> Artifact:
        return replace(published(kind, folders[kind.stage]), digest=kind.stage)

    return stage.inputs(**{name: opened(kind) for name, kind in stage.reads.items()})


def run_stage(stage: Stage, folders: Folders, config: Any, folder: Path) -> tuple[Output, Path]:
    """Run a stage on the artifacts in `folders`, which then holds its output too."""
    out, progress = folder / "out", folder / "progress"
    out.mkdir(parents=True)
    progress.mkdir()
    ctx = StageContext(out, progress, 0, torch.device("cpu"), SilentReporter())
    output = stage.run(inputs_of(stage, folders), config, ctx)
    folders[stage.name] = out
    return output, out


def write_tokens(
    folder: Path, split: str, tokens: np.ndarray, docs: np.ndarray, vocab_size: int
) -> None:
    """Write one split of an ingestion; `docs` [S, T] is each token's document."""
    starts = [np.flatnonzero(np.diff(row, prepend=row[0] - 1)) for row in docs]
    columns = {
        "seq_id": list(range(len(tokens))),
        "split": [split] * len(tokens),
        "source": ["topics"] * len(tokens),
        "doc_ids": [row[start].tolist() for row, start in zip(docs, starts, strict=True)],
        "doc_starts": [start.tolist() for start in starts],
        "input_ids": [row.tolist() for row in tokens],
    }
    write_token_shard(folder, split, 0, columns, vocab_size)
