"""Prefect on PostgreSQL: many runs at once through two workers; its password stays secret."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from flows.api import Api
from flows.database import DATABASE_ENV, PREFECT_ENV, for_clients, take_database, without_password
from flows.local_server import LocalServer, free_port, offline_settings
from flows.lost_runs import SILENCE_SECONDS, automation
from rldecoder.errors import BadInputError
from tasks import tied
from tests.conftest import ROOT
from tests.postgresql import PASSWORD, postgresql

RUNS = 50
URL = f"postgresql+asyncpg://me:{PASSWORD}@db/prefect"


def test_the_url_leaves_the_environment() -> None:
    env = {DATABASE_ENV: URL, PREFECT_ENV: "x", "PREFECT_API_DATABASE_PASSWORD": "y", "HOME": "/"}
    assert take_database(env) == URL
    assert env == {"HOME": "/"}
    assert take_database(env) is None
    for wrong in (
        URL.replace("+asyncpg", ""),
        "sqlite:///x",
        URL.removesuffix("/prefect"),
        PASSWORD,
    ):
        with pytest.raises(BadInputError, match="DATABASE is none") as caught:
            take_database({DATABASE_ENV: wrong})
        assert PASSWORD not in str(caught.value)


def test_runs_do_not_inherit_the_password_of_the_database() -> None:
    env = {"PATH": "/bin", "PGPASSWORD": PASSWORD}
    assert for_clients(env, URL) == {"PATH": "/bin"}
    assert for_clients(env, None) == env  # then it is for somebody else's


def test_words_of_the_server_lose_the_password() -> None:
    assert without_password(f"no {PASSWORD}!", URL) == "no ***!"
    quoted = URL.replace(PASSWORD, "a%40b")
    assert without_password("a@b a%40b", quoted) == "*** ***"
    assert without_password("plain", None) == "plain"


def test_make_hands_it_on_unseen() -> None:
    """The recipe names no URL, so that neither make nor `ps` shows it."""
    done = subprocess.run(
        ["make", "-n", "ui", f"DATABASE={URL}", "PYTHON=python3"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "flows.serve_ui" in done.stdout
    assert PASSWORD not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, Path, dict[str, str]]]:
    """A server on PostgreSQL as `make ui` starts it, and what its clients have to know."""
    home = tmp_path_factory.mktemp("prefect")
    with postgresql() as database, ExitStack() as stack:
        server = LocalServer(home, free_port(), ui=True, password="word", database=database)
        stack.callback(server.stop)
        server.wait()
        client = {"PREFECT_API_URL": server.url, "PREFECT_API_AUTH_STRING": "word"}
        yield Api(server.url, "word"), home, {**os.environ, **offline_settings(home), **client}


@pytest.mark.slow
def test_fifty_runs_through_two_workers(
    server: tuple[Api, Path, dict[str, str]], tmp_path: Path
) -> None:
    api, home, env = server
    api.send("POST", "/work_pools/", {"name": "inline", "type": "inline"})
    flow = api.send("POST", "/flows/", {"name": "small"})["id"]
    deployment = api.send(
        "POST", "/deployments/", {"name": "small", "flow_id": flow, "work_pool_name": "inline"}
    )["id"]
    log = tmp_path / "runs"
    log.touch()
    deadline = time.monotonic() + 300
    with ExitStack() as stack:
        for _ in range(2):
            # Neither can take all of them.
            worker = tied.start(
                [sys.executable, "-m", "tests.flows.inline_worker", "inline", str(log), "30"],
                env={**env, "PREFECT_WORKER_QUERY_SECONDS": "1"}, cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(tied.stop, worker)
        while len(api.send("POST", "/work_pools/inline/workers/filter", {})) < 2:
            assert time.monotonic() < deadline, "a worker did not come"
            time.sleep(0.5)

        runs = {
            api.send(
                "POST", f"/deployments/{deployment}/create_flow_run",
                {"state": {"type": "SCHEDULED"}},
            )["id"]
            for _ in range(RUNS)
        }  # fmt: skip
        wanted = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "limit": 200}
        while len(done := api.send("POST", "/flow_runs/filter", wanted)) < RUNS:
            assert time.monotonic() < deadline, f"{len(done)} of {RUNS} runs ended"
            time.sleep(0.5)

    ran = [line.split() for line in log.read_text().splitlines()]
    assert Counter(run for run, _ in ran) == Counter(runs)  # none lost, none twice
    assert {run["run_count"] for run in done} == {1}
    assert len({process for _, process in ran}) == 2
    # It is the database of the URL: nothing went into a file of the home.
    assert not list(home.glob("*.db"))
    assert PASSWORD not in (home / "server.log").read_text()


@pytest.mark.slow
def test_a_run_whose_worker_fell_silent_is_ended(server: tuple[Api, Path, dict[str, str]]) -> None:
    """Prefect's own automation, with ten seconds of silence in place of two minutes."""
    api, _, _ = server
    wanted = automation()
    wanted["trigger"]["within"] = 10
    api.send("POST", "/automations/", wanted)
    flow = api.send("POST", "/flows/", {"name": "beating"})["id"]
    silent, ended = (
        api.send("POST", "/flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
        for _ in range(2)
    )

    def report(run: str, what: str) -> None:
        event = {
            "id": str(uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": f"prefect.flow-run.{what}",
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
            "related": [],
            "payload": {},
        }
        api.send("POST", "/events", [event])

    for run in (silent, ended):
        report(run, "heartbeat")
    time.sleep(2)  # events of one moment are taken in any order; beats are 30 s apart
    report(ended, "Completed")
    deadline = time.monotonic() + 240
    while (state := api.send("GET", f"/flow_runs/{silent}", None)["state"])["type"] != "CRASHED":
        assert time.monotonic() < deadline, state
        time.sleep(1)
    assert state["message"] == f"No heartbeat for {SILENCE_SECONDS} s."
    assert api.send("GET", f"/flow_runs/{ended}", None)["state"]["type"] == "RUNNING"
