"""Commands in forks of one process that has imported everything (`tests.fork_server`)."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT


class Done(NamedTuple):
    """A command that has ended."""

    returncode: int
    """Negative: the signal that ended it."""
    stdout: str
    stderr: str


class ForkServer:
    """`tests.fork_server`, from outside; one command at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rldecoder-forks-")
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        # Unbuffered, so that `ended` sees every answer that has not been read.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def run(self, *arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Done:
        """Run a command and wait. For `cwd` and `env` see `start`."""
        self.start(*arguments, cwd=cwd, env=env)
        return self.wait()

    def start(self, *arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> int:
        """Start a command; its process id, once it is about to begin.

        Args:
            cwd: where it runs.
            env: what its environment has besides the server's. What a library reads when it is
                imported was read before.
        """
        request = {
            "arguments": arguments, "out": str(self._out), "err": str(self._err), "cwd": str(cwd),
            "env": dict(env or {}),
        }  # fmt: skip
        self._requests.write(f"{json.dumps(request)}\n".encode())
        return int(self._answers.readline())

    def ended(self) -> bool:
        """Whether the command has."""
        return bool(select.select([self._answers], [], [], 0)[0])

    def wait(self) -> Done:
        """The command's end. Until the next one starts, its process id belongs to nobody else."""
        code = int(self._answers.readline())
        return Done(code, *(path.read_text(errors="replace") for path in (self._out, self._err)))

    def close(self) -> None:
        """End it."""
        self._requests.close()
        self._process.wait()
        self._folder.cleanup()
