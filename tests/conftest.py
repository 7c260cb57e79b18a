"""Fixtures shared by all tests: tiny models on disk, and a stage context."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import atexit
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from rldecoder.reporting import SilentReporter
from rldecoder.stages.context import StageContext
from tests import array_checks

if TYPE_CHECKING:
    from rldecoder import Run
    from rldecoder.config.run import RunConfig
    from rldecoder.lm.frozen import FrozenLM
    from tests.forked import ForkServer

# Before the packages in question are imported.
array_checks.install()

# Prefect reads its settings when it is imported: none of the user's, nothing sent anywhere.
# One home a pytest-xdist worker: two of them would fight over one server.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
if os.environ.get("RLDECODER_TEST_HOME_OF") != _WORKER:
    os.environ["RLDECODER_TEST_HOME_OF"] = _WORKER
    os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="rldecoder-prefect-")
    atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.pop("PREFECT_API_URL", None)

# Shared, busy machines make single examples slow now and then; and a failure must repeat.
settings.register_profile("rldecoder", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("rldecoder")

ROOT = Path(__file__).resolve().parents[1]
DEBUG = ROOT / "configs" / "debug.yaml"
SHARED_DATA = ROOT.parent / "shared" / "data"


# First: xdist reads the marks in the same hook, and what has none when it looks goes to any worker.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file to one worker, and all that share the Prefect UI to one.

    What takes longest begins first, so that no worker is left alone with it at the end; xdist
    would begin with what has most tests (`--no-loadscope-reorder` keeps this order).
    """

    def group(item: pytest.Item) -> str:
        return "ui" if "ui" in getattr(item, "fixturenames", ()) else item.path.name

    slow = {group(item) for item in items if item.get_closest_marker("slow")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: (group(item) != "ui", group(item) not in slow))


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Whatever tests ran before on this worker, one draws the same: a failure must repeat."""
    torch.manual_seed(0)
    array_checks.calls.clear()


@pytest.fixture(scope="session")
def tiny_lm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 (4 layers, d_model 64, vocabulary 512) with a real tokenizer."""
    from rldecoder.lm.random_model import make_random_model

    return make_random_model(tmp_path_factory.mktemp("gpt2") / "model", architecture="gpt2")


@pytest.fixture(scope="module")
def lm(tiny_lm_dir: Path) -> FrozenLM:
    """The random GPT-2, loaded."""
    from rldecoder.lm.frozen import FrozenLM

    return FrozenLM.load(tiny_lm_dir)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of the same size."""
    from rldecoder.lm.random_model import make_random_model

    return make_random_model(tmp_path_factory.mktemp("llama") / "model", architecture="llama")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The workplace's corpora; tests that want them skip on machines without."""
    if not SHARED_DATA.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED_DATA


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test alone in place of the user's."""
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_proof() -> Iterator[None]:
    """For tests that count or spoil forward passes: those that prove a model are none of them."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("lm.frozen", "stages.cache_activations"):
            patch.setattr(f"rldecoder.{place}.prove", lambda lm, **_: None)
        yield


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., StageContext]:
    """A factory of stage contexts; `name` keeps several apart, the same name resumes."""

    def make(name: str = "stage", *, seed: int = 0, device: str = "cpu") -> StageContext:
        return make_context(tmp_path / name, seed=seed, device=device)

    return make


def make_context(folder: Path, *, seed: int = 0, device: str = "cpu") -> StageContext:
    """A silent stage context in a folder; the same folder resumes."""
    out, progress = folder / "out", folder / "progress"
    out.mkdir(parents=True, exist_ok=True)
    progress.mkdir(parents=True, exist_ok=True)
    return StageContext(out, progress, seed, torch.device(device), SilentReporter())


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Runs commands without the ten CPU seconds that a new interpreter and its imports take."""
    from tests.forked import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def debug_store(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A store with the whole debug run, built once a test session; treat as read-only.

    `make test` has built one and names it. Else, under pytest-xdist, the workers share one: the
    first one that needs it builds it.
    """
    if given := os.environ.get("RLDECODER_DEBUG_STORE"):
        return Path(given)
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    store = shared / "debug-store"
    with FileLock(shared / "debug-store.lock"):
        if not (shared / "debug-store.done").exists():
            result = subprocess.run(
                [sys.executable, "-m", "rldecoder.cli", "run", "configs/debug.yaml",
                 "--store", str(store), "--no-prefect"],
                cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr + result.stdout
            (store / "stdout.txt").write_text(result.stdout)
            (shared / "debug-store.done").touch()
    return store


@pytest.fixture(scope="module")
def config() -> RunConfig:
    """The settings of the debug run."""
    from rldecoder.config.run import load_run_config

    return load_run_config(DEBUG)


@pytest.fixture(scope="module")
def run(debug_store: Path) -> Run:
    """The debug run, opened."""
    from rldecoder import open_run

    return open_run(DEBUG, debug_store)
