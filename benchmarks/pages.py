"""A run's pages for programs: the real server as a process of its own, and where Chromium is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

QUIET = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
"""For Chromium: containers give it no namespaces for its sandbox, and little shared memory."""


@contextmanager
def serving(config: Path, store: Path, overrides: Sequence[str] = ()) -> Iterator[str]:
    """The address of `rldecoder serve` on a finished run, while the block lasts.

    Raises:
        SystemExit: it did not start; the message is what it said.
    """
    command = [sys.executable, "-m", "rldecoder.cli", "serve", str(config)]
    command += ["--store", str(store), "--port", "0"]
    command += [part for one in overrides for part in ("--set", one)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield _address(process)
    finally:
        process.terminate()
        process.wait()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+/", said.replace("\n", "")):
            return found[0]
    raise SystemExit(f"The server did not start:\n{said}")


def chromium() -> str:
    """The path of an installed Chromium.

    Raises:
        SystemExit: there is none.
    """
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise SystemExit("No Chromium was found. Install it (Debian: apt-get install chromium).")
    return found
