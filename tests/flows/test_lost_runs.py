"""Runs whose worker is lost: who notices, and how often they are started again."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from flows.lost_runs import MESSAGE, MOST_RUNS, NAME, CrashedRuns, automation, watch_workers
from tests.flows.ui_client import Ui


class Server:
    """Answers as Prefect's would, and keeps what it was told."""

    def __init__(self, *found: dict[str, Any]) -> None:
        self.found = list(found)
        self.told: list[tuple[str, str, Any]] = []

    def send(self, method: str, path: str, body: Any) -> Any:
        self.told.append((method, path, body))
        return self.found if path.endswith("/filter") else None


def test_a_crashed_run_is_started_again_up_to_a_limit() -> None:
    runs = [{"id": f"id-{n}", "name": f"run-{n}", "run_count": n} for n in range(1, MOST_RUNS + 2)]
    server = Server(*runs)
    since = datetime(2026, 1, 2, tzinfo=UTC)
    said = CrashedRuns(server, since).restart()  # type: ignore[arg-type]
    assert [line.split()[2] for line in said] == ["run-1", "run-2"]
    (_, _, asked), *changes = server.told
    assert asked["flow_runs"]["end_time"] == {"after_": "2026-01-02T00:00:00+00:00"}
    assert asked["flow_runs"]["deployment_id"] == {"is_null_": False}
    assert [path for _, path, _ in changes] == [f"/flow_runs/id-{n}/set_state" for n in (1, 2)]
    assert {body["state"]["type"] for _, _, body in changes} == {"SCHEDULED"}


@pytest.mark.parametrize("enabled", [True, False])
def test_an_automation_that_people_switched_off_stays_off(enabled: bool) -> None:
    server = Server({"id": "a", "name": NAME, "enabled": enabled}, {"id": "b", "name": "theirs"})
    watch_workers(server)  # type: ignore[arg-type]
    assert server.told[-1] == ("PUT", "/automations/a", automation(enabled=enabled))
    new = Server()
    watch_workers(new)  # type: ignore[arg-type]
    assert new.told[-1] == ("POST", "/automations/", automation())


@pytest.mark.slow
def test_make_ui_has_made_it_and_starts_what_crashed(ui: Ui) -> None:
    found = [a for a in ui.post("/automations/filter", {}).json() if a["name"] == NAME]
    assert len(found) == 1
    assert found[0]["enabled"]
    assert found[0]["trigger"]["posture"] == "Proactive"
    assert found[0]["trigger"]["within"] == 120

    # As a worker reports a process that died, of a run that nobody is going to execute.
    later = ui.post(
        f"/deployments/{ui.deployment('pipeline/pipeline-debug')['id']}/create_flow_run",
        {
            "parameters": {"parameters": {"config": "debug", "until": "sync_tokenizer"}},
            "state": {
                "type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"},
            },
        },
    ).json()["id"]  # fmt: skip
    for state in ({"type": "RUNNING"}, {"type": "CRASHED", "name": "Crashed"}):
        ui.post(f"/flow_runs/{later}/set_state", {"state": state, "force": True})
    run = ui.until(
        lambda: (run := ui.get(f"/flow_runs/{later}"))["state"]["type"] != "CRASHED" and run
    )
    said = [state["message"] for state in ui.get(f"/flow_run_states/?flow_run_id={later}")]
    assert MESSAGE in said
    assert run["run_count"] == 1
    ui.post(f"/flow_runs/{later}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
