"""kill -9 in the middle of each long stage, then run again: same digests, same bytes.

For Ctrl-C see test_interrupted_runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import load_run_config
from rldecoder.runner import plan
from rldecoder.stages.table import STAGES

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "debug.yaml"

pytestmark = pytest.mark.slow


def start(store: Path, until: str) -> subprocess.Popen[str]:
    """Start the run in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "rldecoder.cli", "run", str(CONFIG), "--store", str(store),
         "--no-prefect", "--until", until],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def without(stage: str, source: Path, target: Path) -> tuple[ArtifactStore, ArtifactRef]:
    """A copy of the finished store that lacks `stage` and all that follows."""
    shutil.copytree(source, target)
    names = [s.name for s in STAGES]
    for name in names[names.index(stage) :]:
        shutil.rmtree(target / name, ignore_errors=True)
    return ArtifactStore(target), plan(load_run_config(CONFIG))[stage]


def interrupt_midway(process: subprocess.Popen[str], progress: Path, how: int) -> None:
    """Send a signal as soon as the stage has written its first checkpoint."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        # os.walk, unlike rglob, takes it calmly when a folder is renamed under its feet.
        if any(n.startswith("step-") for _, folders, _ in os.walk(progress) for n in folders):
            process.send_signal(how)
            process.wait()
            return
        time.sleep(0.002)
    output = process.communicate()[0]
    pytest.fail(f"no checkpoint was seen before the stage ended:\n{output[-3000:]}")


@pytest.mark.parametrize("stage", ["train_sae", "train_decoder", "train_ppo", "control_ppo"])
def test_killed_stage_resumes_to_the_same_bytes(
    debug_store: Path, tmp_path: Path, stage: str
) -> None:
    store, ref = without(stage, debug_store, tmp_path / "store")
    interrupt_midway(start(store.root, stage), store.progress_path(ref), signal.SIGKILL)
    assert not store.is_published(ref), "the kill came too late to prove anything"
    second = start(store.root, stage)
    output = second.communicate()[0]
    assert second.returncode == 0, output
    assert "goes on from its last checkpoint" in output
    resumed, undisturbed = store.verify(ref), ArtifactStore(debug_store).verify(ref)
    assert resumed.resumed
    assert not undisturbed.resumed
    names = [n for n in undisturbed.files if n != "timing.json"]
    assert {n: resumed.files[n].sha256 for n in names} == {
        n: undisturbed.files[n].sha256 for n in names
    }
