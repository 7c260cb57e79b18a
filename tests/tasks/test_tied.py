"""Tied children: none outlives its parent, however the parent goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tasks import tied
from tests.conftest import ROOT

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ready', flush=True); time.sleep(60)",
]  # fmt: skip
WITH_CHILD = [
    sys.executable, "-c",
    "import subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "print(child.pid, flush=True); time.sleep(60)",
]  # fmt: skip
PARENT = """
import sys, time
from tasks import tied
print(tied.start([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


def gone(pid: int, within_seconds: float = 10.0) -> bool:
    """Whether the process ends in time (a zombie has ended)."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_the_command_runs_with_its_environment_and_descriptors() -> None:
    reading, writing = os.pipe()
    process = tied.start(
        [sys.executable, "-c", f"import os; os.write({writing}, os.environ['WORD'].encode())"],
        env={**os.environ, "WORD": "hello"},
        pass_fds=[writing],
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "hello"
    assert process.wait(10) == 0


def test_a_missing_command_is_an_exit_status() -> None:
    process = tied.start(["/no/such/command"], stderr=subprocess.DEVNULL)
    assert process.wait(10) != 0


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_kill_9_of_the_parent_ends_the_child() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    assert psutil.pid_exists(child)
    parent.kill()
    parent.communicate()
    assert gone(child)


def test_stop_takes_the_whole_group() -> None:
    process = tied.start(WITH_CHILD, stdout=subprocess.PIPE)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    tied.stop(process)
    process.stdout.close()
    assert process.returncode == -signal.SIGTERM
    assert gone(grandchild)


def test_stop_kills_what_ignores_sigterm() -> None:
    process = tied.start(STUBBORN, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    tied.stop(process, grace_seconds=0.2)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_the_child_does_not_share_the_terminals_signals() -> None:
    process = tied.start(SLEEPER)
    try:
        time.sleep(0.2)
        assert os.getsid(process.pid) != os.getsid(0)
    finally:
        tied.stop(process)


def test_stopping_twice_is_harmless() -> None:
    process = tied.start([sys.executable, "-c", ""])
    process.wait(10)
    tied.stop(process)
    assert process.returncode == 0
