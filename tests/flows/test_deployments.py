"""`make ui` again: what people changed in the UI stays, what belongs to the code is renewed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import deployments
from flows.api import Api
from flows.deployments import APPLIED_FILE, deploy
from tests.flows.ui_client import ROOT, Ui

NIGHTLY = next(
    entry
    for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    if entry["name"] == "nightly"
)


class FakeApi:
    """A server with one deployment, which keeps what it is sent."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self.found, self.patched = found, dict[str, Any]()

    def send(self, method: str, path: str, body: Any) -> Any:
        """Answer the two requests that are made."""
        if method == "POST":
            return self.found
        self.patched[path] = body
        return None


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `prefect deploy` is given."""
    given: list[Any] = []
    monkeypatch.setattr(deployments, "_apply", lambda project, home, env: given.append(project))
    return given


def entry_of(project: Any) -> Any:
    return next(entry for entry in project["deployments"] if entry["name"] == "nightly")


CHANGED = {
    "id": "1", "name": "nightly", "entrypoint": NIGHTLY["entrypoint"], "paused": True,
    "parameters": {"parameters": {"config": "debug"}}, "description": "mine", "tags": ["t"],
    "global_concurrency_limit": {"limit": 3},
}  # fmt: skip


def test_a_new_deployment_is_made_as_the_file_says(tmp_path: Path, applied: list[Any]) -> None:
    api = FakeApi([])
    deploy(api, tmp_path, {})  # type: ignore[arg-type]
    assert entry_of(applied[0]) == NIGHTLY
    assert api.patched == {}
    assert json.loads((tmp_path / APPLIED_FILE).read_text())["nightly"] == NIGHTLY


@pytest.mark.parametrize("record", [None, "{torn", NIGHTLY])
def test_what_people_changed_stays(tmp_path: Path, applied: list[Any], record: Any) -> None:
    if record is not None:
        text = record if isinstance(record, str) else json.dumps({"nightly": record})
        (tmp_path / APPLIED_FILE).write_text(text)
    api = FakeApi([CHANGED])
    deploy(api, tmp_path, {})  # type: ignore[arg-type]
    assert "schedules" not in entry_of(applied[0])
    assert api.patched == {
        "/deployments/1": {
            "parameters": CHANGED["parameters"], "description": "mine", "tags": ["t"],
            "paused": True, "concurrency_limit": 3,
        }
    }  # fmt: skip


def test_what_nobody_changed_is_left_to_the_file(tmp_path: Path, applied: list[Any]) -> None:
    same = {
        **CHANGED, "paused": False, "parameters": NIGHTLY["parameters"], "tags": [],
        "description": NIGHTLY["description"], "global_concurrency_limit": {"limit": 1},
    }  # fmt: skip
    api = FakeApi([same])
    deploy(api, tmp_path, {})  # type: ignore[arg-type]
    assert api.patched == {}


def test_what_the_file_says_anew_counts(tmp_path: Path, applied: list[Any]) -> None:
    before = {**NIGHTLY, "schedules": [], "parameters": {}, "concurrency_limit": 9, "tags": ["x"]}
    (tmp_path / APPLIED_FILE).write_text(json.dumps({"nightly": before}))
    api = FakeApi([CHANGED])
    deploy(api, tmp_path, {})  # type: ignore[arg-type]
    assert entry_of(applied[0]) == NIGHTLY
    kept = {"description": "mine", "paused": True}
    assert api.patched == {"/deployments/1": kept}


@pytest.mark.slow
def test_a_paused_schedule_stays_paused(ui: Ui, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real server and the real command, for this one deployment."""
    apply = deployments._apply

    def apply_one(project: Any, home: Path, env: Any) -> None:
        apply({**project, "deployments": [entry_of(project)]}, home, env)

    monkeypatch.setattr(deployments, "_apply", apply_one)
    path = f"/deployments/{ui.deployment('nightly/nightly')['id']}"
    env = {
        **os.environ, "PREFECT_API_URL": ui.url, "PREFECT_API_AUTH_STRING": ui.password,
    }  # fmt: skip

    def schedules() -> dict[str, bool]:
        return {s["schedule"]["cron"]: s["active"] for s in ui.get(path)["schedules"]}

    before = ui.get(path)
    (night,) = (s for s in before["schedules"] if s["slug"] == "nightly")
    own = {"active": False, "schedule": {"cron": "7 7 * * *", "timezone": "UTC"}}
    added = ui.post(f"{path}/schedules", [own]).raise_for_status().json()[0]["id"]
    ui.patch(f"{path}/schedules/{night['id']}", {"active": False})
    ui.patch(path, {"paused": True, "description": "mine"})
    expected = schedules()
    assert expected["0 3 * * *"] is False
    try:
        deploy(Api(ui.url, ui.password), ui.home, env)
        after = ui.get(path)
        assert schedules() == expected
        assert (after["paused"], after["description"]) == (True, "mine")
        assert after["parameters"] == before["parameters"]
        assert after["concurrency_limit"] == before["concurrency_limit"]
        assert after["pull_steps"] == before["pull_steps"]
    finally:
        ui.patch(path, {"paused": False, "description": before["description"]})
        ui.patch(f"{path}/schedules/{night['id']}", {"active": True})
        ui.delete(f"{path}/schedules/{added}")


@pytest.mark.slow
def test_the_prefect_command_works_as_documented(ui: Ui) -> None:
    line = (
        f'export PREFECT_API_AUTH_STRING="$(cat {ui.home}/ui-password)" PREFECT_API_URL={ui.url}; '
        ".venv/bin/prefect deployment ls"
    )
    env = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nightly/nightly" in done.stdout
