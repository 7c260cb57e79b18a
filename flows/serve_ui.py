"""`make ui`: one command for the Prefect server, the work pool, the deployments and a worker.

Everything is local to this machine and to the project (`.prefect`); Ctrl-C stops all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil

from flows.local_server import LocalServer, offline_settings, owned, prefect_home, shared_url
from rldecoder import interrupts
from rldecoder.entry import guarded
from rldecoder.errors import EXIT_DONE, BadInputError, NoResourceError
from tasks import tied

ROOT = Path(__file__).resolve().parents[1]
POOL = "local"
"""The process work pool that prefect.yaml names."""

_GRACE_SECONDS = 15.0
_TAIL_CHARACTERS = 1500


def serve(home: Path, port: int) -> None:
    """Run server and worker until interrupted.

    Raises:
        BadInputError: the UI already runs on this home.
        NoResourceError: a part does not start, or ends by itself.
    """
    with contextlib.ExitStack() as stack:
        offer = stack.enter_context(owned(home))
        if offer is None:
            running = shared_url(home)
            raise BadInputError(
                f"{home} is in use by another Prefect server.",
                f"It is at {running.removesuffix('/api')}." if running else "A run uses it.",
                "Use that one, wait for the run, or set PREFECT_HOME to another folder.",
            )
        _say("starting the server ...")
        server = LocalServer(home, port, ui=True)
        stack.callback(server.stop)
        server.wait()
        env = {**os.environ, **offline_settings(home), "PREFECT_API_URL": server.url}
        _make_pool(server.url)
        with (home / "worker.log").open("wb") as log:
            worker = tied.start(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL],
                env=env, cwd=ROOT, death_signal=signal.SIGTERM,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        stack.callback(_stop_worker, worker)
        _say("making the deployments of prefect.yaml ...")
        _deploy(env)
        offer(server.url)  # from now on `rldecoder run` shows its runs here too
        _say(f"ready: {server.url.removesuffix('/api')}   (Ctrl-C stops everything)")
        while server.process.poll() is None and worker.poll() is None:
            time.sleep(0.5)
        raise NoResourceError(
            "The Prefect server or its worker ended by itself.", "", f"Logs are in {home}."
        )


def _make_pool(url: str) -> None:
    """Make the work pool unless it is there; the worker gives it its template."""
    answer = httpx.post(f"{url}/work_pools/", json={"name": POOL, "type": "process"}, timeout=60)
    if answer.status_code not in (httpx.codes.CREATED, httpx.codes.CONFLICT):
        raise NoResourceError("The work pool cannot be made.", answer.text[:_TAIL_CHARACTERS])


def _deploy(env: Mapping[str, str]) -> None:
    """Apply prefect.yaml."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        env=dict(env), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip()
        raise NoResourceError("prefect.yaml cannot be applied.", output[-_TAIL_CHARACTERS:])


def _stop_worker(worker: subprocess.Popen[bytes]) -> None:
    """Stop the worker, then the flow runs that it started, which have sessions of their own."""
    runs: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        runs = psutil.Process(worker.pid).children(recursive=True)
    for run in runs:
        with contextlib.suppress(psutil.NoSuchProcess):
            run.terminate()  # a flow reports that it was stopped, and can be retried
    tied.stop(worker, _GRACE_SECONDS)
    _, alive = psutil.wait_procs(runs, timeout=_GRACE_SECONDS)
    for run in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            run.kill()


def _say(message: str) -> None:
    print(f"rldecoder ui: {message}", flush=True)


def main() -> int:
    """Parse the arguments, serve, and turn errors into one message."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve_ui", description=__doc__)
    parser.add_argument("--port", type=int, default=4200, help="port of the UI on 127.0.0.1")
    port = parser.parse_args().port
    return guarded(lambda: _serve_until_interrupted(port))


def _serve_until_interrupted(port: int) -> int:
    try:
        serve(prefect_home(), port)
    except KeyboardInterrupt:
        _say("stopped")
        interrupts.forget()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
