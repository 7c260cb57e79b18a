"""However a program ends, its exit code is one of ours: 0, 1, 2, 3 or 70."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rldecoder import entry, interrupts
from rldecoder.entry import guarded
from rldecoder.errors import (
    BadInputError,
    GateFailedError,
    InterruptedRunError,
    NoResourceError,
    UnexpectedError,
)
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _no_signals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The test process keeps its own handlers."""
    monkeypatch.setattr(interrupts, "listen", lambda: None)
    monkeypatch.setattr(interrupts, "settle", lambda code: None)
    monkeypatch.setattr(entry, "_mend_streams", lambda: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def closed_pipe() -> SystemExit:
    """What rich and typer raise when nobody reads any more."""
    error = SystemExit(1)
    error.__context__ = BrokenPipeError()
    return error


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (GateFailedError("no"), 1, "error: no"),
        (BadInputError("what"), 2, "error: what"),
        (NoResourceError("what"), 2, "error: what"),
        (OSError(28, "No space left on device"), 2, "error: The disk is full"),
        (MemoryError(), 2, "error: Not enough memory"),
        (InterruptedRunError("stopped"), 3, "error: stopped"),
        (KeyboardInterrupt(), 3, "error: Interrupted."),
        (BrokenPipeError(), 3, ""),
        (closed_pipe(), 3, ""),
        (KeyError("x"), 70, "error: RL-Decoder has a fault"),
        (SystemExit(1), 70, "error: RL-Decoder has a fault"),
        (UnexpectedError("in a stage"), 70, "error: in a stage"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_end_has_its_code(
    capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, said: str
) -> None:
    def command() -> int:
        raise raised

    assert guarded(command) == code
    assert capsys.readouterr().err.startswith(said)


def test_codes_of_commands_pass() -> None:
    assert guarded(lambda: None) == 0
    assert guarded(lambda: 2) == 2


@pytest.mark.parametrize(("raised", "code"), [(RuntimeError("x"), 3), (GateFailedError("no"), 1)])
def test_whatever_an_interruption_was_turned_into_is_one(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, code: int
) -> None:
    monkeypatch.setattr(interrupts, "asked", lambda: True)

    def command() -> Any:
        raise raised

    assert guarded(command) == code


def test_the_traceback_can_be_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(entry.SHOW_TRACEBACK, "1")
    guarded(lambda: 1 // 0)
    assert "ZeroDivisionError" in capsys.readouterr().err


TALK = """
import sys
from rich.console import Console
from rldecoder.entry import guarded
console = Console()
sys.exit(guarded(lambda: [console.print("line") for _ in range(5000)] and 0))
"""


def shell(command: str, code: str = TALK) -> subprocess.CompletedProcess[str]:
    """Run Python code, named $CODE, in a shell's line."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PY": sys.executable, "CODE": code}, check=False,
    )  # fmt: skip


def test_output_that_nobody_reads_or_that_does_not_fit() -> None:
    closed = shell('"$PY" -c "$CODE" | head -1; echo ${PIPESTATUS[0]}')
    assert (closed.stdout, closed.stderr) == ("line\n3\n", "")
    full = shell('"$PY" -c "$CODE" > /dev/full')
    assert full.returncode == 2
    assert full.stderr.startswith("error: The disk is full.")
    absent = shell('"$PY" -c "$CODE" >&-')
    assert (absent.returncode, absent.stderr) == (0, "")


def test_a_name_that_is_not_unicode_is_printed() -> None:
    code = "from rldecoder.entry import guarded; import sys; sys.exit(guarded(lambda: print({!r})))"
    result = shell('LC_ALL=C PYTHONIOENCODING=ascii "$PY" -c "$CODE"', code.format("a\udcffb–"))
    assert (result.returncode, result.stdout) == (0, "a\\udcffb\\u2013\n")


def test_an_interrupted_program_ends_with_its_code() -> None:
    """What libraries left to do at the end is done, and what was written is out."""
    code = """
import atexit
from rldecoder.entry import guarded, leave
atexit.register(print, "done at exit")
def command():
    print("begun")
    raise KeyboardInterrupt
leave(guarded(command))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stdout == "begun\ndone at exit\n"
    assert "Interrupted" in done.stderr

    # Output that was closed on the way is nothing that could change the code.
    code = code.replace('print, "done at exit"', "sys.stdout.close").replace(
        "import atexit", "import atexit, sys"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 3
