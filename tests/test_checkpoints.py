"""Checkpoints: atomic, newest that verifies, exact optimiser and generator state."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from rldecoder.checkpoints import (
    Checkpoints,
    pack_optimizer,
    pack_rng,
    unpack_optimizer,
    unpack_rng,
)


def test_newest_is_loaded_and_old_ones_are_dropped(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load() is None
    for step in (1, 2, 10):
        checkpoints.save(step, {"w": torch.full((2,), float(step))}, {"epoch": step})
    loaded = checkpoints.load()
    assert loaded is not None
    assert (loaded.step, loaded.state["epoch"], loaded.tensors["w"].tolist()) == (10, 10, [10, 10])
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_and_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    notes: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=3, note=notes.append)
    checkpoints.save(1, {"w": torch.ones(1)}, {})
    checkpoints.save(2, {"w": torch.ones(1)}, {})
    (tmp_path / "step-000000002" / "tensors.safetensors").write_bytes(b"\x00" * 5)
    (tmp_path / "writing-000000003").mkdir()
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded.step == 1
    [note] = notes
    assert "step-000000002 is passed over" in note


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_optimizer_resumes_bit_exactly(tmp_path: Path, kind: type[torch.optim.Adam]) -> None:
    def setup() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, kind([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.1}])

    def steps(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).pow(2).mean().backward()
            optimizer.step()

    model, optimizer = setup()
    steps(model, optimizer, 3)
    tensors, state = pack_optimizer(optimizer)
    Checkpoints(tmp_path).save(
        3, {**tensors, **pack_rng(), "w": model.weight, "b": model.bias}, {"optimizer": state}
    )
    steps(model, optimizer, 3)
    other, other_optimizer = setup()
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None
    with torch.no_grad():
        other.weight.copy_(loaded.tensors["w"])
        other.bias.copy_(loaded.tensors["b"])
    unpack_optimizer(other_optimizer, loaded.tensors, loaded.state["optimizer"])
    unpack_rng(loaded.tensors)
    steps(other, other_optimizer, 3)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_all_global_generators_are_restored() -> None:
    random.gauss(0, 1)  # leaves a cached second value behind
    saved = pack_rng()
    first = (random.gauss(0, 1), random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    unpack_rng(saved)
    assert first == (random.gauss(0, 1), random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
