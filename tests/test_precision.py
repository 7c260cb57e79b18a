from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rldecoder import precision
from rldecoder.artifacts.catalogue import ModelFolder
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.precision import fast_dtype, has_bfloat16
from rldecoder.sae.model import SaeSpec
from rldecoder.sae.training import InputStatistics, SaeTrainer
from tests.stages.published import published
from tests.tiny_models import TINY_RECORD


@pytest.mark.parametrize(("units", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_model_and_sae_use_what_the_cpu_is_fast_with(
    tiny_lm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    units: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: units)
    shutil.copytree(tiny_lm_dir, tmp_path / "model")
    record = TINY_RECORD.model_copy(update={"compute_dtype": "bfloat16"})
    ModelFolder.record.save(tmp_path, record)
    model = published(ModelFolder, tmp_path)
    assert model.load().dtype == dtype
    # A dtype that is asked for by name is never changed.
    assert model.load(dtype=torch.bfloat16).dtype == torch.bfloat16
    spec = SaeSpec(architecture="topk", d_model=8, num_latents=16, k=2)
    trainer = SaeTrainer(spec, TrainSaeConfig(k=2), 1, InputStatistics(torch.zeros(8), 1.0), 0)
    assert trainer.architecture.matmul_dtype == dtype


def test_only_bfloat16_on_a_cpu_without_units_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast_dtype("float32", "cpu") == torch.float32
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: device != "cpu")
    assert fast_dtype("bfloat16", "cuda") == torch.bfloat16
    assert fast_dtype("bfloat16", "cpu") == torch.float32


@pytest.mark.parametrize(
    ("supported", "has", "fast"),
    [
        (False, {"cpu_name": "AMD EPYC"}, False),
        (True, {"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        (True, {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        # Measured: slower than float32 (docs/logbook.md, eleventh session).
        (True, {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        (True, {"architecture": "arm64"}, True),
    ],
)
def test_which_cpus_are_fast_with_bfloat16(
    monkeypatch: pytest.MonkeyPatch, supported: bool, has: dict[str, object], fast: bool
) -> None:
    mkldnn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: supported)
    monkeypatch.setattr(precision.torch, "ops", SimpleNamespace(mkldnn=mkldnn))
    monkeypatch.setattr(precision.torch.cpu, "get_capabilities", lambda: has)
    assert has_bfloat16("cpu") == fast
    assert has_bfloat16("cuda")
