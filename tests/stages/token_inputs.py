"""Random tokens and the tiny model, as the artifacts that stages before the cache read; a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rldecoder.artifacts.catalogue import Corpus, ModelFolder
from rldecoder.config.sae import SweepSaeConfig, TrainSaeConfig
from rldecoder.data.packing import PackedSequence, TokenShardWriter
from rldecoder.lm.specs import ModelRecord
from rldecoder.stages.inputs import TextInputs
from tests.stages.published import published

TINY_RECORD = ModelRecord(
    name="tiny",
    title="tiny",
    licence="none: random weights",
    hook_layer=None,
    compute_dtype="float32",
    source={"kind": "random"},
    weights_sha256="0" * 64,
    weight_files={},
    model_type="gpt2",
    parameters=265_600,
    num_layers=4,
    d_model=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    d_mlp=256,
    vocab_size=512,
    context_length=512,
    tied_embeddings=True,
)
"""What `sync_tokenizer` would say of the fixture `tiny_lm_dir`."""


def tiny_model(model_folder: Path) -> ModelFolder:
    """The fixture `tiny_lm_dir`, published with its record."""
    ModelFolder.record.save(model_folder.parent, TINY_RECORD)
    return published(ModelFolder, model_folder.parent)


def token_inputs(
    folder: Path, model_folder: Path, length: int, sequences: Mapping[str, int]
) -> TextInputs:
    """`sequences` of each split, of `length` random tokens below 512."""
    generator = np.random.default_rng(0)
    for split, count in sequences.items():
        writer = TokenShardWriter(folder, split, 512, 100)
        rows = generator.integers(0, 512, (count, length))
        writer.add([PackedSequence("s", [0], [0], row) for row in rows])
        writer.close()
    return TextInputs(tiny_model(model_folder), published(Corpus, folder))


def small_sweep(length: int, layers: tuple[int, ...], ks: tuple[int, ...]) -> SweepSaeConfig:
    """A sweep on such tokens, of seconds."""
    return SweepSaeConfig(
        layers=layers,
        ks=ks,
        expansions=(2.0,),
        train_tokens=60 * length,
        test_tokens=12 * length,
        splice_sequences=3,
        training=TrainSaeConfig(
            budget_tokens=40 * 64, batch_tokens=64, init_tokens=256, warmup_steps=3, lr=3e-3
        ),
    )
