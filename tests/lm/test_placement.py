"""Large models: what does not fit is refused by name, or kept on the disk and read as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rldecoder.config.model import Loading, SyncTokenizerConfig
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.lm import placement
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.placement import count_parameters, require_whole_weights
from rldecoder.lm.proof import prove
from tests.tiny_models import TINY_RECORD

OFFLOADED = Loading(device_map="auto", offload=True)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(placement, "_most_memory", lambda _device: {"cpu": 500_000})
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_packed_weights_need_a_package(
    tiny_llama_dir: Path, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda _name: None)
    loading = Loading.model_validate({"quantization": bits})
    with pytest.raises(BadInputError, match=f"quantization: {bits}` cannot be used.*bitsandbytes"):
        FrozenLM.load(tiny_llama_dir, loading=loading)


@pytest.mark.parametrize(
    ("bits", "dtype", "most"), [("8bit", torch.float32, 0.02), ("4bit", torch.bfloat16, 0.3)]
)
def test_packed_weights_are_nearly_the_model_and_parts_of_themselves(
    tiny_llama_dir: Path, bits: str, dtype: torch.dtype, most: float,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without a CUDA device, too: the load proves trunk, tail and unembedding in full."""
    pytest.importorskip("bitsandbytes")
    loading = Loading.model_validate({"quantization": bits})
    whole, lm = (
        FrozenLM.load(tiny_llama_dir),
        FrozenLM.load(tiny_llama_dir, dtype=dtype, loading=loading),
    )
    assert lm.dtype == dtype
    assert count_parameters(lm.model) == count_parameters(whole.model)
    packed = [m for m in lm.model.modules() if type(m).__name__.startswith("Linear") and
              type(m).__module__.startswith("bitsandbytes")]  # fmt: skip
    assert len(packed) == 7 * lm.num_layers
    assert {p.dtype for m in packed for p in m.parameters()} <= {torch.int8, torch.uint8}
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        right, found = (
            one.unembed(one.tail(one.trunk(ids, 2).resid, 2)).float().log_softmax(-1)
            for one in (whole, lm)
        )
    kl = float((right.exp() * (right - found)).sum(-1).mean())
    assert 0 < kl < most * float(-right.exp().mul(right).sum(-1).mean())
    assert not caplog.records
    with pytest.raises(BadInputError, match="weights are quantised"):
        require_whole_weights(lm.base, "They are copied")

    # Rounding is no excuse: another scale of the logits is found out.
    monkeypatch.setattr(lm, "unembed", lambda hidden: 1.2 * type(lm).unembed(lm, hidden))
    with pytest.raises(BadInputError, match="logits differ"):
        prove(lm)


@pytest.mark.usefixtures("little_memory")
def test_a_model_on_the_disk_is_the_same_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole = FrozenLM.load(tiny_llama_dir)
    record = tmp_path / "model.json"
    TINY_RECORD.model_copy(update={"loading": OFFLOADED}).save(record)
    lm = FrozenLM.load(tiny_llama_dir, record=record)
    places = lm.model.hf_device_map.values()
    assert "disk" in places
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    for layer in range(lm.num_layers + 1):
        resid = lm.trunk(ids, layer).resid
        torch.testing.assert_close(resid, whole.trunk(ids, layer).resid)
        with torch.no_grad():
            torch.testing.assert_close(lm.tail(resid, layer), whole.tail(resid, layer))

    with pytest.raises(BadInputError, match="sends gradients through the frozen model's blocks"):
        lm.tail(resid.requires_grad_(), 2)
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(BadInputError, match="sends gradients"):
        lm.splice(ids, 2, lambda resid: scale * resid)
    with pytest.raises(BadInputError, match="weights are offloaded"):
        require_whole_weights(lm.base, "They are copied")
    require_whole_weights(whole.base, "They are copied")


@pytest.mark.usefixtures("little_memory")
def test_what_fits_nowhere_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(NoResourceError, match="larger than the memory"):
        FrozenLM.load(tiny_llama_dir, loading=Loading(device_map="auto"))


def test_a_record_says_how_weights_are_kept_only_where_it_was_set() -> None:
    assert "loading" not in TINY_RECORD.model_dump(mode="json")
    config = SyncTokenizerConfig(device_map="auto", offload=True)
    assert config.loading == OFFLOADED
    assert "device_map" not in SyncTokenizerConfig().digest_fields()
    assert config.digest_fields()["device_map"] == "auto"
    with pytest.raises(ValidationError, match="only read with device_map: auto"):
        SyncTokenizerConfig(offload=True)
