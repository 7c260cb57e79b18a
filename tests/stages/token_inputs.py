"""Random tokens and the tiny model, as the artifacts that stages before the cache read; a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rldecoder.artifacts.catalogue import Corpus, ModelFolder
from rldecoder.config.sae import SweepSaeConfig, TrainSaeConfig
from rldecoder.data.packing import PackedSequence, TokenShardWriter
from rldecoder.stages.inputs import TextInputs
from tests.stages.published import published
from tests.tiny_models import TINY_RECORD


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
