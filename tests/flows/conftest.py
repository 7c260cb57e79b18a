"""`make ui`, started once for all tests of the flows: server, work pool, deployments, worker."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.guarded_server import REQUEST_SECONDS
from flows.local_server import free_port
from tasks import tied
from tests.flows.ui_client import FAKE_KEYS, ROOT, Ui


@pytest.fixture(scope="session")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    """`make ui` in a process of its own; at the end Ctrl-C must stop all of it.

    Its forms may name stores of the tests' temporary folders.
    """
    port, home = free_port(), Path(os.environ["PREFECT_HOME"])
    env = {
        **os.environ,
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        **FAKE_KEYS,
    }
    process = tied.start(
        [sys.executable, "-m", "flows.serve_ui", "--port", str(port),
         "--allow-store", str(tmp_path_factory.getbasetemp())],
        env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = b""
        for line in process.stdout:
            said += line
            if b"ready" in line:
                break
        assert b"ready: http://127.0.0.1:" in said, said.decode()
        began = time.monotonic()
        slow = socket.create_connection(("127.0.0.1", port))
        slow.sendall(b"GET /api/health HTTP/1.1\r\n")
        yield Ui(f"http://127.0.0.1:{port}/api", home)
        if time.monotonic() - began > REQUEST_SECONDS + 10:
            slow.settimeout(0.1)
            with contextlib.suppress(ConnectionResetError):
                assert slow.recv(1) == b"", "half a request was waited for all the time"
        slow.close()
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2  # the server and the worker
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 0, rest.decode()
        assert b"stopped" in rest
        _, alive = psutil.wait_procs(family, timeout=10)
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        tied.stop(process)
