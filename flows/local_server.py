"""A Prefect server of this machine: 127.0.0.1, a password, nothing sent anywhere; SQLite, unless
`make ui` is given another database.

Its home (`PREFECT_HOME`, by default `.prefect` in the working directory) belongs to one server at
a time: two servers on one SQLite file disturb each other. Who owns it holds an `flock` on
`server.lock`, which dies with its holder, and writes its address there.

Nothing here imports Prefect, whose settings are read when it is imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

from flows.database import PREFECT_ENV, without_password
from flows.password import password_of
from flows.project import ROOT
from rldecoder.errors import BadInputError, NoResourceError
from tasks import tied

STARTUP_SECONDS = 300
"""A start costs 9 to 23 CPU seconds, minutes on a machine that is busy; Prefect gives it 20 s."""

_TAIL_CHARACTERS = 1500
_NOT_THE_SERVERS = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY")
"""Settings of clients: a server that knows them would ask another server, or show them."""


class Reachable(NamedTuple):
    """A server that answers."""

    url: str
    """Ends in `/api`."""
    password: str | None
    """None: Prefect's own settings say how to log in, if at all."""


def prefect_home() -> Path:
    """The project-local home of Prefect."""
    return Path(os.environ.get("PREFECT_HOME") or Path.cwd() / ".prefect").absolute()


def offline_settings(home: Path) -> dict[str, str]:
    """Environment variables for every process that imports Prefect."""
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(STARTUP_SECONDS),
        "PREFECT_CLI_PROMPT": "false",
    }


@contextlib.contextmanager
def owned(home: Path) -> Iterator[Callable[[str], None] | None]:
    """Own the home for the length of the block.

    Yields a function that writes the server's address for others to find (call it only if they
    may use it), or None when another process owns the home.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(home / "server.lock", flags, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        os.ftruncate(fd, 0)
        yield lambda url: _overwrite(fd, url)
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _overwrite(fd: int, url: str) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"url": url}).encode(), 0)


def shared_url(home: Path) -> str | None:
    """The address that the home's owner offers to others, if it answers."""
    try:
        url = json.loads((home / "server.lock").read_text(encoding="utf-8"))["url"]
    except (OSError, ValueError, KeyError):  # no owner, or one that offers nothing
        return None
    return str(url) if answers(url) else None


def answers(url: str) -> bool:
    """Whether a Prefect API answers at `url` (which ends in `/api`)."""
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalServer:
    """A Prefect server in a process of its own, which dies with this one.

    It answers only to its own name, its own pages and its password (`flows.guarded_server`).

    Args:
        home: its PREFECT_HOME, with the database and `server.log`.
        port: where it listens, on 127.0.0.1.
        ui: serve the web UI and run the scheduler; without it the server only records a run.
        password: what its API asks for.
        database: the URL of a PostgreSQL database; None: SQLite in the home.
    """

    def __init__(
        self, home: Path, port: int, *, ui: bool, password: str, database: str | None = None
    ) -> None:
        self.url = f"http://127.0.0.1:{port}/api"
        self._database = database
        self._port = port
        self._log = home / "server.log"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)

        own = f"http://127.0.0.1:{port}"
        env = {
            **{k: v for k, v in os.environ.items() if k not in _NOT_THE_SERVERS},
            **offline_settings(home),
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_API_BASE_PATH": "/api",
            "PREFECT_SERVER_API_AUTH_STRING": password,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": own,
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": str(ui).lower(),
            "PREFECT_SERVER_UI_ENABLED": str(ui).lower(),
            "PREFECT_SERVER_UI_API_URL": self.url,
            "PREFECT_SERVER_UI_SERVE_BASE": "/",
            "PREFECT__SERVER_FINAL": "1",
        }
        if not ui:
            env["PREFECT__SERVER_EPHEMERAL"] = "1"
        if database is not None:
            env[PREFECT_ENV] = database

        command = [sys.executable, "-m", "flows.guarded_server"]
        with self._log.open("wb") as log:
            self.process = tied.start(
                command, cwd=ROOT, env=env, death_signal=signal.SIGTERM, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            NoResourceError: it ended, or does not answer in time; the log's end is in the text.
        """
        deadline = time.monotonic() + STARTUP_SECONDS
        while not self._answers():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                said = self._log.read_text(encoding="utf-8", errors="replace")
                tail = without_password(said[-_TAIL_CHARACTERS:], self._database)
                raise NoResourceError(
                    "The Prefect server "
                    + ("ended at once." if ended else f"did not start in {STARTUP_SECONDS} s."),
                    tail.strip(),
                    f"Its log is {self._log}. `rldecoder run --no-prefect` needs no server.",
                )
            time.sleep(0.2)

    def _answers(self) -> bool:
        # Not httpx, whose every client costs a tenth of a second, in which the server could start.
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/api/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End it and wait until it is gone."""
        tied.stop(self.process)


@contextlib.contextmanager
def server_for_one_run(home: Path, while_starting: Callable[[], object]) -> Iterator[Reachable]:
    """A server for one run, in this order:

    that of PREFECT_API_URL; the one that `make ui` keeps on this home; a new one on this home's
    database; or, where another run uses that, a new one in a temporary folder.

    Args:
        while_starting: called while a new server starts, which takes seconds.

    Raises:
        BadInputError: PREFECT_API_URL is set and nothing answers there, or the password file
            cannot be used.
        NoResourceError: the new server does not start.
    """
    shared = shared_url(home)
    given = os.environ.get("PREFECT_API_URL") or shared
    if given:
        if not answers(given):
            raise BadInputError(
                f"No Prefect server answers at {given}.",
                "PREFECT_API_URL names it.",
                "Start it, unset the variable to use a local one, or add --no-prefect.",
            )
        while_starting()
        asks = given == shared and "PREFECT_API_AUTH_STRING" not in os.environ
        yield Reachable(given, password_of(home) if asks else None)
        return
    with contextlib.ExitStack() as stack:
        if stack.enter_context(owned(home)) is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rldecoder-")))
        password = secrets.token_urlsafe(32)
        server = LocalServer(home, free_port(), ui=False, password=password)
        stack.callback(server.stop)
        while_starting()
        server.wait()
        yield Reachable(server.url, password)
