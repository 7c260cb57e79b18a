"""kill -9 in the middle of each long stage, then run again: same digests, same bytes.

For Ctrl-C see test_interrupted_runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import load_run_config
from rldecoder.runner import plan
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT
from tests.forked import ForkServer

CONFIG = ROOT / "configs" / "debug.yaml"

pytestmark = pytest.mark.slow


def command(store: Path, until: str) -> tuple[str, ...]:
    """A run up to a stage."""
    return ("run", str(CONFIG), "--store", str(store), "--no-prefect", "--until", until)


def without(stage: str, source: Path, target: Path) -> tuple[ArtifactStore, ArtifactRef]:
    """A copy of the finished store that lacks `stage` and all that follows."""
    shutil.copytree(source, target)
    names = [s.name for s in STAGES]
    for name in names[names.index(stage) :]:
        shutil.rmtree(target / name, ignore_errors=True)
    return ArtifactStore(target), plan(load_run_config(CONFIG))[stage]


def kill_midway(forks: ForkServer, pid: int, progress: Path) -> None:
    """Kill a command as soon as its stage has written the first checkpoint."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not forks.ended():
        # os.walk, unlike rglob, takes it calmly when a folder is renamed under its feet.
        if any(n.startswith("step-") for _, folders, _ in os.walk(progress) for n in folders):
            os.kill(pid, signal.SIGKILL)
            assert forks.wait().returncode in (-signal.SIGKILL, 0)
            return
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"no checkpoint was seen before the stage ended:\n{forks.wait().stderr[-3000:]}")


@pytest.mark.parametrize("stage", ["train_sae", "train_decoder", "train_ppo", "control_ppo"])
def test_killed_stage_resumes_to_the_same_bytes(
    debug_store: Path, tmp_path: Path, forks: ForkServer, stage: str
) -> None:
    store, ref = without(stage, debug_store, tmp_path / "store")
    pid = forks.start(*command(store.root, stage))
    kill_midway(forks, pid, store.progress_path(ref))
    assert not store.is_published(ref), "the kill came too late to prove anything"
    second = forks.run(*command(store.root, stage))
    assert second.returncode == 0, second.stderr
    assert "goes on from its last checkpoint" in second.stdout + second.stderr
    resumed, undisturbed = store.verify(ref), ArtifactStore(debug_store).verify(ref)
    assert resumed.resumed
    assert not undisturbed.resumed
    names = [n for n in undisturbed.files if n != "timing.json"]
    assert {n: resumed.files[n].sha256 for n in names} == {
        n: undisturbed.files[n].sha256 for n in names
    }
