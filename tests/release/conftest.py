"""A release of the debug run, whose store is gone when it is opened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import rldecoder
from rldecoder.artifacts.manifests import MANIFEST, write_sealed
from rldecoder.release.manifest import ReleaseManifest, read_release
from rldecoder.release.writing import write_release
from rldecoder.run import Run
from tests.conftest import ROOT

CONFIG = ROOT / "configs" / "debug.yaml"
PROMPT = "The import statement finds a module and then"


class Released(NamedTuple):
    """A release and what wrote it."""

    root: Path
    store: Path
    """Where the run's store was."""


@pytest.fixture(scope="session")
def run(debug_store: Path) -> Run:
    """The debug run."""
    return rldecoder.open_run(CONFIG, debug_store)


@pytest.fixture(scope="session")
def released(debug_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Released:
    """A release with the supervised decoder; treat as read-only."""
    store = tmp_path_factory.mktemp("run") / "store"
    shutil.copytree(debug_store, store)
    root = tmp_path_factory.mktemp("elsewhere") / "release"
    write_release(rldecoder.open_run(CONFIG, store), root, supervised=True)
    shutil.rmtree(store)
    return Released(root, store)


@pytest.fixture
def copied(released: Released, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(released.root, tmp_path / "release"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where these tests find the model again."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a release fetches or makes goes nowhere else."""
    monkeypatch.setenv("RLDECODER_CACHE", str(cache))


def reseal(root: Path, **changes: Any) -> ReleaseManifest:
    """Change a release's manifest as its writer could have."""
    manifest = read_release(root)
    return write_sealed(root / MANIFEST, manifest.model_copy(update=changes))
