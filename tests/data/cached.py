"""A small activation cache with known rows."""

from __future__ import annotations

from pathlib import Path

import torch

from rldecoder.data.activations import (
    ActivationBatch,
    ActivationMeta,
    ActivationWriter,
)

D_MODEL = 8


def meta(**changes: object) -> ActivationMeta:
    values = {
        "model_name": "tiny",
        "hook_layer": 2,
        "num_layers": 4,
        "d_model": D_MODEL,
        "vocab_size": 512,
        "context_length": 11,
    }
    return ActivationMeta.model_validate(values | changes)


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(count)
    return (
        ids // 10,
        ids % 10 + 1,
        torch.randint(0, 512, (count,), generator=generator),
        torch.randn(count, D_MODEL, generator=generator),
        torch.randn(count, D_MODEL, generator=generator),
    )


def write(folder: Path, count: int, shard_rows: int, split: str = "train") -> tuple:
    data = rows(count)
    with ActivationWriter(folder, split, meta(), shard_rows) as writer:
        for start in range(0, count, 7):
            writer.add(*(t[start : start + 7] for t in data))
    return data


def token_order(batches: list[ActivationBatch]) -> list[int]:
    return [int(s) * 10 + int(p) - 1 for b in batches for s, p in zip(b.seq_id, b.pos, strict=True)]
