"""Checkpoints: atomic, newest that verifies, exact optimiser state."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from rldecoder.checkpoints import Checkpoints
from rldecoder.optimizer_state import pack_optimizer, unpack_optimizer


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
        3, {**tensors, "w": model.weight, "b": model.bias}, {"optimizer": state}
    )
    torch.manual_seed(1)
    steps(model, optimizer, 3)
    other, other_optimizer = setup()
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None
    with torch.no_grad():
        other.weight.copy_(loaded.tensors["w"])
        other.bias.copy_(loaded.tensors["b"])
    unpack_optimizer(other_optimizer, loaded.tensors, loaded.state["optimizer"])
    torch.manual_seed(1)
    steps(other, other_optimizer, 3)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "c").save(3, {"w": torch.arange(40.0)}, {"curves": [[1, "mse", 0.5]]})
    notes: list[str] = []
    checkpoints = Checkpoints(tmp_path / "c", note=notes.append)
    parts = sorted((tmp_path / "c").glob("step-*/*"))
    rng = random.Random(0)
    for _ in range(500):
        file = rng.choice(parts)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        assert checkpoints.load() is None, (file.name, bytes(damaged))
        file.write_bytes(whole)
    assert len(notes) == 500
    assert checkpoints.load() is not None


def test_anothers_and_unsealed_checkpoints_are_passed_over(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "theirs", owner="train_sae/a").save(900, {"w": torch.zeros(2)}, {})
    notes: list[str] = []
    mine = Checkpoints(tmp_path / "mine", owner="train_sae/b", note=notes.append)
    mine.save(1, {"w": torch.ones(3)}, {})
    for step in (900, 901):
        shutil.copytree(
            tmp_path / "theirs" / "step-000000900", tmp_path / "mine" / f"step-{step:09d}"
        )
    (tmp_path / "mine" / "step-000000901" / "seal.json").unlink()
    loaded = mine.load()
    assert loaded is not None
    assert (loaded.step, loaded.tensors["w"].tolist()) == (1, [1, 1, 1])
    assert "No such file" in notes[0]
    assert "belongs to 'train_sae/a (format" in notes[1]
    # They do not push out the next ones either.
    mine.save(2, {"w": torch.ones(3)}, {})
    found = mine.load()
    assert found is not None
    assert found.step == 2


def test_a_renamed_checkpoint_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, {}, {})
    (tmp_path / "step-000000004").rename(tmp_path / "step-000000400")
    (tmp_path / "step-000000500").write_text("a file")
    assert checkpoints.load() is None


def test_files_beside_a_checkpoint_must_be_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    part = tmp_path / "log" / "1.parquet"
    part.write_bytes(b"one")
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {}, {}, beside=[tmp_path / "log"])
    (tmp_path / "log" / "2.parquet").write_bytes(b"two")
    checkpoints.save(2, {}, {}, beside=[tmp_path / "log"])
    found = checkpoints.load()
    assert found is not None
    assert found.beside == {"log/1.parquet", "log/2.parquet"}
    (tmp_path / "log" / "2.parquet").write_bytes(b"twO")
    older = checkpoints.load()
    assert older is not None
    assert older.step == 1
    part.unlink()
    assert checkpoints.load() is None
