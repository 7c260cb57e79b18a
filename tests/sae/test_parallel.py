"""Two processes (gloo, on the CPU) take the steps that one process takes."""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rldecoder.config.sae import SparsityPhase, TrainSaeConfig
from rldecoder.errors import NoResourceError
from rldecoder.sae.parallel import Group, peers
from rldecoder.sae.training import SaeTrainer, input_statistics, published_spec

D_MODEL, STEPS = 32, 40
CONFIG = TrainSaeConfig(
    expansion=3, k=4, lr=1e-2, lr_final=1e-3, warmup_steps=5, dead_after_tokens=640,
    matmul_dtype="float32", sparsity_warmup_steps=20, bandwidth=0.02, threshold_init=0.01,
    sparsity_phases=(SparsityPhase(steps=1000, coefficient=0.02),), resample_every_steps=15,
)  # fmt: skip


def batch(index: int) -> Tensor:
    """Sparse combinations of fixed directions, the same in every process."""
    rows = torch.randn(48, D_MODEL, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(index)
    active = torch.rand(128, 48, generator=generator) < 0.08
    return 20 * (active * (1 + torch.rand(128, 48, generator=generator))) @ rows + 7


def train(group: Group, device: torch.device, architecture: str, weights: Path | None) -> None:
    """Module-level, for it is run in another process too; the first one leaves its weights."""
    config = CONFIG.model_copy(update={"architecture": architecture})
    spec = published_spec(config, D_MODEL, hook_layer=1, model_name="m")
    trainer = SaeTrainer(spec, config, STEPS, input_statistics(batch(999)), 0, device, group)
    with torch.no_grad():
        trainer.weights.b_enc[:30] = -50.0
    last: Any = None
    for index in range(STEPS):
        last = trainer.step(batch(index))
    if weights is not None and group.rank == 0:
        tensors, _ = trainer.pack()
        numbers = torch.tensor([last.loss, last.mse, last.l0, last.dead_fraction])
        save_file({**tensors, "numbers": numbers}, weights)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu", "relu"])
def test_two_processes_equal_one(architecture: str, tmp_path: Path) -> None:
    """With dead latents, so that AuxK, resampling and the counters are exchanged too."""
    cpu = torch.device("cpu")
    train(Group(), cpu, architecture, tmp_path / "one")
    with peers(2, train, (architecture, None), cpu) as (group, device):
        assert (group.rank, group.size) == (0, 2)
        train(group, device, architecture, tmp_path / "two")
    one = load_file(tmp_path / "one")
    two = load_file(tmp_path / "two")
    assert one.keys() == two.keys()
    assert torch.equal(one["tokens_since_fired"], two["tokens_since_fired"])
    for name, tensor in one.items():
        if tensor.is_floating_point() and not name.startswith("optimizer"):
            torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=2e-4, msg=name)


def fail(group: Group, device: torch.device) -> None:
    raise RuntimeError("the other process failed")


def abort_at_exit(group: Group, device: torch.device) -> None:
    group.mean(torch.ones(1))
    atexit.register(os.abort)


@pytest.mark.slow
def test_what_is_done_cannot_fail_while_the_interpreter_is_torn_down() -> None:
    with peers(2, abort_at_exit, (), torch.device("cpu")) as (group, _):
        assert float(group.mean(torch.ones(1))) == 1.0


@pytest.mark.slow
def test_a_failing_process_ends_all() -> None:
    with (
        pytest.raises(Exception, match=r"other process failed|closed"),
        peers(2, fail, (), torch.device("cpu")) as (group, _),
    ):
        group.mean(torch.ones(1))


def test_one_process_starts_nothing_and_exchanges_nothing() -> None:
    with peers(1, fail, (), torch.device("cpu")) as (group, device):
        value = torch.ones(3, requires_grad=True)
        assert torch.equal(group.mean(value), value)
        assert not group.mean(value).requires_grad
        assert torch.equal(group.slice(value), value)
        assert device.type == "cpu"


def test_slices_are_disjoint_and_of_one_length() -> None:
    x = torch.arange(11)
    parts = [Group(rank, 3).slice(x).tolist() for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_devices_are_counted_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(NoResourceError, match="2 processes were asked for; 1 devices"),
        peers(2, fail, (), torch.device("cuda")),
    ):
        pass
