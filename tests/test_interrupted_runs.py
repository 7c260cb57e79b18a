"""SIGINT at random moments of debug runs: none is lost, and what follows gives the same bytes.

RLDECODER_SIGINT_ROUNDS says how many interruptions there are; the full form has 100.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rldecoder.artifacts.store import ArtifactStore, Manifest
from rldecoder.config.run import load_run_config
from rldecoder.runner import plan
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT
from tests.forked import ForkServer

CONFIG = ROOT / "configs" / "debug.yaml"
ROUNDS = int(os.environ.get("RLDECODER_SIGINT_ROUNDS", "8"))
FULL = ROUNDS > 8
"""All stages take their turn; otherwise those of less than two seconds."""
EACH = 4 if FULL else 2
"""Interruptions of a stage before it may finish."""
UNTIMED = ("timing.json", "frontier.parquet", "report.html", "logbook_entry.md",
           "reproducibility.md")  # fmt: skip
"""Files that hold times, or the manifest's."""

pytestmark = pytest.mark.slow


def hashes(manifest: Manifest) -> dict[str, str]:
    """The files that no clock decides."""
    return {
        name: entry.sha256
        for name, entry in manifest.files.items()
        if name.rsplit("/", 1)[-1] not in UNTIMED
    }


def stages(undisturbed: ArtifactStore, chance: random.Random) -> Iterator[str]:
    """Names of stages in random order, without end."""
    refs = plan(load_run_config(CONFIG))
    names = [s.name for s in STAGES if FULL or undisturbed.manifest(refs[s.name]).wall_seconds < 2]
    while True:
        yield from chance.sample(names, len(names))


@pytest.mark.timeout(60 * ROUNDS + 600)
def test_no_interruption_is_lost_and_the_same_bytes_follow(
    debug_store: Path, tmp_path: Path, forks: ForkServer
) -> None:
    chance = random.Random(24)
    undisturbed = ArtifactStore(debug_store)
    store = ArtifactStore(shutil.copytree(debug_store, tmp_path / "store"))
    refs = plan(load_run_config(CONFIG))
    interrupted = too_late = 0
    for stage in stages(undisturbed, chance):
        ref, expected = refs[stage], undisturbed.manifest(refs[stage])
        command = ("run", str(CONFIG), "--store", str(store.root), "--no-prefect", "--until", stage)
        shutil.rmtree(store.path(ref))
        for _ in range(EACH):
            after = chance.uniform(0, expected.wall_seconds + 0.5)
            pid = forks.start(*command)
            time.sleep(after)
            os.kill(pid, signal.SIGINT)  # one that has ended is not collected yet
            code, out, error = forks.wait()
            output = out + error
            where = f"{stage} after {after:.2f} s:\n{output[-3000:]}"
            assert "Traceback" not in output, where
            assert "Exception ignored" not in output, where
            if code == 0:  # it had ended, or had no more to do than to end
                assert "done in" in output, where
                too_late += 1
                shutil.rmtree(store.path(ref))
            else:
                assert code == 3, where
                assert "Interrupted." in output, where
                interrupted += 1
        last = forks.run(*command)
        assert last.returncode == 0, f"{stage}:\n{last.stderr[-3000:]}"
        assert hashes(store.verify(ref)) == hashes(expected), stage
        print(f"{stage}: {interrupted} interruptions, {too_late} came too late", flush=True)
        if interrupted >= ROUNDS:
            break


def test_a_new_process_can_be_interrupted_while_it_imports(tmp_path: Path) -> None:
    chance = random.Random(24)
    for _ in range(max(2, ROUNDS // 10)):
        process = subprocess.Popen(
            [sys.executable, "-m", "rldecoder.cli", "run", str(CONFIG), "--no-prefect",
             "--store", str(tmp_path / "store")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        status = Path(f"/proc/{process.pid}/status")
        # Until it listens, the interpreter itself is starting.
        while not int(_field(status, "SigCgt"), 16) >> (signal.SIGTERM - 1) & 1:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 3))
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 3, output
        assert output.startswith("error: Interrupted.") or "store" in output, output
        assert "Traceback" not in output


def _field(status: Path, name: str) -> str:
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return lines[name].strip()
