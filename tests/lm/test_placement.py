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
from rldecoder.lm.placement import require_whole_weights
from tests.tiny_models import TINY_RECORD

OFFLOADED = Loading(device_map="auto", offload=True)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(placement, "_most_memory", lambda _device: {"cpu": 500_000})
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_packed_weights_need_a_device_and_a_package(tiny_llama_dir: Path, bits: str) -> None:
    loading = Loading.model_validate({"quantization": bits})
    with pytest.raises(BadInputError, match=f"quantization: {bits}` cannot be used.*no CUDA"):
        FrozenLM.load(tiny_llama_dir, loading=loading)


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
