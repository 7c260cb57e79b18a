"""The smoke test measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rldecoder.errors import BadInputError, NumericalError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.random_model import make_random_model
from rldecoder.lm.smoke import _sample, smoke_test
from rldecoder.precision import fast_dtype


def test_shapes_sizes_and_throughput(tiny_llama_dir: Path) -> None:
    result = smoke_test(str(tiny_llama_dir), num_tokens=1000)
    assert result.num_tokens == 1024
    assert [layer for layer, _ in result.hidden_shapes] == [0, 1, 2, 3, 4]
    assert {shape for _, shape in result.hidden_shapes} == {(8, 128, 64)}
    assert result.logits_shape == (8, 128, 512)
    assert result.dtype == str(fast_dtype("bfloat16", "cpu")).removeprefix("torch.")
    assert result.tokens_per_second > 100
    assert result.peak_memory_bytes > 50e6
    assert all(rms > 0 for rms in result.hidden_rms)
    rows = dict(result.rows())
    assert rows["residuals, layers 0 to 4"] == "8 x 128 x 64 each"
    assert "tokens/s on 1,024 tokens" in rows["throughput"]


def test_cross_entropy_is_the_models_own(tiny_lm_dir: Path) -> None:
    result = smoke_test(str(tiny_lm_dir), num_tokens=256, dtype=torch.float32)
    lm = FrozenLM.load(tiny_lm_dir)
    ids = _sample(lm, 256)
    assert ids.shape == (2, 128)
    assert result.cross_entropy == pytest.approx(lm.model(ids, labels=ids).loss.item(), rel=1e-4)
    assert result.parameters == sum(p.numel() for p in lm.model.parameters())


def test_random_model_and_short_contexts(tmp_path: Path) -> None:
    assert smoke_test("random", num_tokens=128).source == "made on the spot"
    short = make_random_model(tmp_path / "short", n_layer=1, n_positions=32)
    assert smoke_test(str(short), num_tokens=100).hidden_shapes[0] == (0, (4, 32, 64))


def test_damaged_weights_are_found(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model", n_layer=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NumericalError, match=r"NaN or infinity: transformer\.h\.1\.mlp\.c_fc\.bias"
    ):
        smoke_test(str(folder), num_tokens=128)


def test_unknown_model() -> None:
    with pytest.raises(BadInputError, match="No model spec named 'gpt5'"):
        smoke_test("gpt5")
