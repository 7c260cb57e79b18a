"""Random tokens and the tiny model, as the artifacts that stages before the cache read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rldecoder.data.packing import PackedSequence, TokenShardWriter
from rldecoder.schemas import write_json
from rldecoder.stages.context import InputArtifact


def token_inputs(
    folder: Path, model_folder: Path, length: int, sequences: Mapping[str, int]
) -> dict[str, InputArtifact]:
    """`sequences` of each split, of `length` random tokens below 512."""
    generator = np.random.default_rng(0)
    for split, count in sequences.items():
        writer = TokenShardWriter(folder, split, 512, 100)
        rows = generator.integers(0, 512, (count, length))
        writer.add([PackedSequence("s", [0], [0], row) for row in rows])
        writer.close()
    model = model_folder.parent
    write_json(model / "model.json", {"name": "tiny", "compute_dtype": "float32"})
    return {
        "sync_tokenizer": InputArtifact("model", "sync_tokenizer", "d", model, {}, {}),
        "ingest": InputArtifact("tokens", "ingest", "d", folder, {}, {}),
    }
