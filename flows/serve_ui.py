"""`make ui`: one command for the Prefect server, the work pool, the deployments and a worker.

Everything is local to this machine and to the project (`.prefect`), but for a PostgreSQL database
where one is named (RLDECODER_DATABASE); Ctrl-C stops all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from flows.api import Api
from flows.database import for_clients, take_database
from flows.deployments import deploy
from flows.ghosts import keep_paused_runs
from flows.guarded_server import CODE_PATH, CODE_SECONDS, LOGIN_PATH
from flows.local_server import LocalServer, offline_settings, owned, prefect_home, shared_url
from flows.lost_runs import ENVIRONMENT, CrashedRuns, watch_workers
from flows.password import password_of
from flows.places import Allowed, allowed_with
from flows.project import PROJECT_FILE, ROOT
from flows.worker import POOL
from rldecoder import interrupts
from rldecoder.entry import guarded
from rldecoder.errors import EXIT_DONE, BadInputError, NoResourceError
from tasks import tied

LOGIN_COMMAND = ".venv/bin/python -m flows.serve_ui --login"

_GRACE_SECONDS = 15.0
_TURN_SECONDS = 0.5
_LOOK_EVERY = 20
"""Turns between two looks for crashed runs."""


def serve(home: Path, port: int, allowed: Allowed, database: str | None = None) -> None:
    """Run server and worker until interrupted.

    Args:
        allowed: what forms may name.
        database: the URL of a PostgreSQL database; None: SQLite in the home.

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
        password = password_of(home)
        server = LocalServer(home, port, ui=True, password=password, database=database)
        stack.callback(server.stop)
        server.wait()

        client = {"PREFECT_API_URL": server.url, "PREFECT_API_AUTH_STRING": password}
        env = {**for_clients(os.environ, database), **offline_settings(home), **client}
        api = Api(server.url, password)
        _make_pool(api)
        watch_workers(api)
        for said in keep_paused_runs(api):
            _say(said)
        stack.callback(_keep_answers, api)  # after the worker: its runs have no process then
        with (home / "worker.log").open("wb") as log:
            worker = tied.start(
                [sys.executable, "-m", "flows.worker"],
                env={**env, **allowed.as_env(), **ENVIRONMENT}, cwd=ROOT,
                death_signal=signal.SIGTERM,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        stack.callback(_stop_worker, worker)

        _say("making the deployments of prefect.yaml ...")
        deploy(api, home, env)
        offer(server.url)  # from now on `rldecoder run` shows its runs here too
        _say(f"ready: {server.url.removesuffix('/api')}   (Ctrl-C stops everything)")
        # A link lets its first user in, so it goes to a person and into no log.
        _say(_login(api) if sys.stdout.isatty() else f"{LOGIN_COMMAND} prints a link to log in")
        crashed = CrashedRuns(api)
        for turn in itertools.count():
            if server.process.poll() is not None or worker.poll() is not None:
                break
            if turn % _LOOK_EVERY == 0:
                with contextlib.suppress(NoResourceError, httpx.HTTPError):  # it is asked again
                    for said in crashed.restart():
                        _say(said)
            time.sleep(_TURN_SECONDS)
        raise NoResourceError(
            "The Prefect server or its worker ended by itself.", "", f"Logs are in {home}."
        )


def _make_pool(api: Api) -> None:
    """Make the work pool, or put it right: the worker gives it its template."""
    body = {"name": POOL, "type": "process"}
    api.send("POST", "/work_pools/", body, also=(httpx.codes.CONFLICT,))
    api.send("PATCH", f"/work_pools/{POOL}", {"base_job_template": {}})


def _keep_answers(api: Api) -> None:
    """At the end: forms that wait are ready for the next start, whoever answers them first."""
    with contextlib.suppress(NoResourceError, httpx.HTTPError):  # the server may be what ended
        list(keep_paused_runs(api))


def _login(api: Api) -> str:
    """A line with a link that logs a browser in, once."""
    code = api.send("POST", api.root + CODE_PATH, {})["code"]
    link = f"{api.root}{LOGIN_PATH}#{code}"
    return f"log in with {link}   (works once, within {CODE_SECONDS / 60:.0f} minutes)"


def login(home: Path) -> str:
    """A line with a link for the UI that runs on this home.

    Raises:
        BadInputError: none does.
    """
    url = shared_url(home)
    if url is None:
        raise BadInputError(f"No UI runs on {home}.", "", "Start it with `make ui`.")
    return _login(Api(url, password_of(home)))


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
    parser.add_argument(
        "--login", action="store_true", help="print a link that logs a browser in, and end"
    )
    for kind, what in (("config", "configs"), ("store", "stores, or texts and models")):
        parser.add_argument(
            f"--allow-{kind}", type=Path, action="append", default=[], metavar="DIR",
            help=f"a folder with {what} that forms may name too; may be given several times",
        )  # fmt: skip
    given = parser.parse_args()
    return guarded(lambda: _serve_until_interrupted(given))


def _serve_until_interrupted(given: argparse.Namespace) -> int:
    try:
        if given.login:
            _say(login(prefect_home()))
            return 0
        if not (ROOT / PROJECT_FILE).is_file():
            raise BadInputError(
                f"{ROOT} has no {PROJECT_FILE}.",
                "It names the deployments that the server offers.",
                "`rldecoder configs DIR` lays one out: start it there.",
            )
        allowed = allowed_with(given.allow_config, given.allow_store)
        serve(prefect_home(), given.port, allowed, take_database())
    except KeyboardInterrupt:
        _say("stopped")
        interrupts.forget()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
