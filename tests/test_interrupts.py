"""Ctrl-C is never lost: dropped wherever Python drops exceptions, it comes again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rldecoder import interrupts, runner
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.checkpoints import Checkpoints
from rldecoder.config.run import load_run_config
from rldecoder.errors import EXIT_INTERRUPTED
from rldecoder.reporting import SilentReporter, interruptible
from rldecoder.stages.context import Output, Stage, StageContext
from rldecoder.stages.inputs import Nothing
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT

PROLOGUE = """
import ctypes, gc, os, signal, sys, threading, time, weakref
from rldecoder import interrupts
from rldecoder.entry import guarded

def strike(*_):
    os.kill(os.getpid(), signal.SIGINT)
    sum(range(1000))  # the interpreter looks for signals while it works

class Thing:
    pass

def compute():
    for _ in range(10**10):
        sum(range(1000))
"""

# Each drops the KeyboardInterrupt, then computes for ever without a progress step.
DROPPED = {
    "del": "Thing.__del__ = strike\nThing()",
    "weakref": "thing = Thing()\nkeep = weakref.ref(thing, strike)\ndel thing",
    "gc": "gc.callbacks.append(strike)\ngc.collect()\ngc.callbacks.clear()",
    "c_callback": (
        "kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)\n"
        "numbers = (ctypes.c_int * 2)()\n"
        "def compare(a, b):\n    strike()\n    return 0\n"
        "ctypes.CDLL(None).qsort(numbers, 2, 4, kind(compare))"
    ),
    "bare_except": "try:\n    strike()\nexcept BaseException:\n    pass",
    "turned": "try:\n    strike()\nexcept BaseException:\n    pass\nraise RuntimeError('library')",
}


def start(body: str) -> subprocess.Popen[str]:
    """A program of ours whose command is `body`."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = f"{PROLOGUE}\ndef command():\n{lines}\nsys.exit(guarded(command))"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def test_a_dropped_interruption_comes_again() -> None:
    processes = {name: start(f"{body}\ncompute()") for name, body in DROPPED.items()}
    for name, process in processes.items():
        output = process.communicate(timeout=60)[0]
        assert process.returncode == EXIT_INTERRUPTED, (name, output)
        assert output.startswith("error: Interrupted."), (name, output)
        assert "Traceback" not in output, (name, output)


def test_a_dropped_interruption_at_the_very_end_still_counts() -> None:
    process = start(DROPPED["del"])
    assert process.communicate(timeout=60)[0].startswith("error: Interrupted.")
    assert process.returncode == EXIT_INTERRUPTED


def test_clean_up_is_left_in_peace_until_the_user_asks_again() -> None:
    body = (
        "try:\n    strike()\nfinally:\n"
        "    end = time.monotonic() + 2.5\n"
        "    while time.monotonic() < end:\n        sum(range(1000))\n"
        "    print('clean', flush=True)\n"
    )
    in_peace = start(body)
    again = start(body.replace("    end =", "    strike()\n    end =", 1))
    assert in_peace.communicate(timeout=60)[0].startswith("clean\nerror: Interrupted.")
    assert again.communicate(timeout=60)[0].startswith("error: Interrupted.")
    assert in_peace.returncode == again.returncode == EXIT_INTERRUPTED


def test_a_signal_after_the_end_ends_at_once_with_the_decided_code() -> None:
    process = start("import atexit\natexit.register(compute)\nprint('done', flush=True)")
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    time.sleep(0.3)
    process.terminate()
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a signal had come, and its exception had been dropped."""
    monkeypatch.setattr(interrupts._State, "asked", True)
    monkeypatch.setattr(interrupts._State, "asked_at", time.monotonic())


@pytest.mark.usefixtures("asked")
def test_every_progress_step_raises_it_again(tmp_path: Path) -> None:
    report = interruptible(SilentReporter())
    steps: dict[str, Any] = {
        "note": lambda: report.note("n"),
        "alert": lambda: report.alert("a"),
        "metrics": lambda: report.metrics("s", 1, {}),
        "track": lambda: report.track("d", 1).__enter__(),
        "save": lambda: Checkpoints(tmp_path / "c").save(1, {"a": torch.zeros(1)}, {}),
    }
    for step in steps.values():
        with pytest.raises(KeyboardInterrupt):
            step()
    assert not (tmp_path / "c").exists()


def test_a_bar_raises_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        interruptible(SilentReporter()).track("d", total=9) as bar,
    ):
        bar.advance()
        monkeypatch.setattr(interrupts._State, "asked", True)
        monkeypatch.setattr(interrupts._State, "asked_at", time.monotonic())
        bar.advance()
        pytest.fail("went on")


def test_nothing_is_published_after_a_dropped_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drops(stage: Stage, inputs: Nothing, config: Any, ctx: StageContext) -> Output:
        monkeypatch.setattr(interrupts._State, "asked", True)
        monkeypatch.setattr(interrupts._State, "asked_at", time.monotonic())
        return Output({"half": 1})

    monkeypatch.setattr(Stage, "run", drops)
    run = load_run_config(ROOT / "configs" / "debug.yaml")
    with pytest.raises(KeyboardInterrupt):
        runner.run_stage(
            run, STAGES[0].name, {}, store=ArtifactStore(tmp_path), report=SilentReporter()
        )
    assert not list(tmp_path.rglob("manifest.json"))
