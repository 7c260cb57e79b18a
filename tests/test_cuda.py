"""Every stage that computes, on a CUDA device: a pretended one in CI, a real one where it is."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import load_run_config
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.reporting import SilentReporter
from rldecoder.runner import run_stage
from rldecoder.sae.model import SaeSpec
from rldecoder.sae.training import SaeTrainer, input_statistics
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT
from tests.pretended_cuda import CudaTensor, pretended_cuda
from tests.smallest import smallest

# What has code of its own on a GPU: bfloat16, blocks; and no step more than it takes.
SHORT = [
    *smallest(
        train_sae={"architecture": "batchtopk", "budget_tokens": 8192, "batch_tokens": 1024},
        control_ppo={"supervised_continuation": False},
    ),
    "sync_tokenizer.compute_dtype=bfloat16",
    "sweep_sae.layers=[]",
    "frontier.depths=[]",
]  # fmt: skip


def test_devices_do_not_mix() -> None:
    with pretended_cuda() as device:
        x = torch.randn(3, 4, device=device)
        assert x.device == device
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert type(x.cpu()) is torch.Tensor
        assert isinstance(x.cpu().to(device), CudaTensor)
        assert isinstance(torch.arange(3, device=x.device) + 2.0, CudaTensor)


def test_gradients_and_optimiser_steps_are_the_cpus() -> None:
    x, moved = torch.randn(5, 4), nn.Linear(4, 3)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(moved.state_dict())
    with pretended_cuda() as device:
        there = moved.to(device)
        optimizer = torch.optim.Adam(there.parameters(), fused=True)
        there(x.to(device)).square().mean().backward()
        optimizer.step()
        got = {name: value.cpu() for name, value in there.state_dict().items()}
    optimizer = torch.optim.Adam(plain.parameters(), fused=True)
    plain(x).square().mean().backward()
    optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(got[name], value)


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "matryoshka"])
def test_an_sae_resumes_there(architecture: str) -> None:
    k = 1 if architecture == "topk" else 4  # with one of 64 some die, and AuxK learns from them
    config = TrainSaeConfig.model_validate(
        {
            "architecture": architecture, "k": k, "batch_tokens": 64, "dead_after_tokens": 128,
            "resample_every_steps": 2, "matmul_dtype": "float32",
        }
    )  # fmt: skip
    kind = {"matryoshka": "jumprelu"}.get(architecture, architecture)
    spec = SaeSpec.model_validate(
        {
            "architecture": kind, "d_model": 16, "num_latents": 64,
            "k": k if kind == "topk" else None,
        }
    )  # fmt: skip
    batches = torch.randn(6, 64, 16)
    with pretended_cuda() as device:

        def trainer() -> SaeTrainer:
            return SaeTrainer(spec, config, 6, input_statistics(batches[0]), 0, device)

        whole, first, second = trainer(), trainer(), trainer()
        for x in batches:
            whole.step(x)
        for x in batches[:3]:
            first.step(x)
        tensors, state = first.pack()
        second.unpack({name: tensor.cpu() for name, tensor in tensors.items()}, state)
        for x in batches[3:]:
            second.step(x)
        assert architecture != "topk" or second.dead_fraction > 0
        assert isinstance(second.weights.enc, CudaTensor)
        for one, other in zip(whole.weights, second.weights, strict=True):
            assert torch.equal(one.cpu(), other.cpu())


def _every_stage(store: ArtifactStore, there: AbstractContextManager[object]) -> None:
    run = load_run_config(ROOT / "configs" / "debug.yaml", SHORT)
    refs: dict[str, ArtifactRef] = {}
    with there:
        for stage in STAGES:
            done = run_stage(
                run, stage.name, refs, store=store, report=SilentReporter(), device="cuda"
            )
            assert not done.reused
            assert store.verify(done.ref).device == "cuda"
            refs[stage.name] = done.ref
            if stage.name == "evaluate":  # the report computes nothing
                return


@pytest.mark.slow
def test_every_stage_runs_on_a_pretended_gpu(tmp_path: Path) -> None:
    # TRL imports bitsandbytes, which binds its kernels at once where CUDA seems to be there.
    importlib.import_module("bitsandbytes")
    _every_stage(ArtifactStore(tmp_path), pretended_cuda())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_stage_runs_on_a_gpu(tmp_path: Path) -> None:
    _every_stage(ArtifactStore(tmp_path), nullcontext())
