"""The Prefect server as the browser sees it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 300
"""For machines that do ten things at once; on a quiet one nothing here takes a tenth of it."""
FAKE_KEYS = {
    "OPENAI_API_KEY": "sk-not-a-key-0123456789",
    "WANDB_API_KEY": "not-a-key-" + "0" * 30,
    "AWS_SECRET_ACCESS_KEY": "not-a-key-of-aws",
}
"""In the environment of `make ui`: they must not be written down anywhere."""


class Ui:
    """The running server, seen through its HTTP API as the browser of its user sees it."""

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home = url, home
        self.password = (home / "ui-password").read_text()
        encoded = base64.b64encode(self.password.encode()).decode()
        self.login = {"Authorization": f"Basic {encoded}"}
        self.csrf = {"Prefect-Csrf-Client": "tests"}
        self._client = httpx.Client(
            base_url=url, timeout=PATIENCE_SECONDS, trust_env=False, headers=self.login
        )
        self.csrf["Prefect-Csrf-Token"] = self.get("/csrf-token?client=tests")["token"]
        self._client.headers.update(self.csrf)

    @property
    def origin(self) -> str:
        """The address of its pages."""
        return self.url.removesuffix("/api")

    def prefect_settings(self) -> Any:
        """For a block in which Prefect in this process uses the server."""
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        return temporary_settings(
            updates={PREFECT_API_URL: self.url, PREFECT_API_AUTH_STRING: self.password}
        )

    def get(self, path: str) -> Any:
        return self._send("GET", path, None).raise_for_status().json()

    def post(self, path: str, body: Any) -> httpx.Response:
        return self._send("POST", path, body)

    def patch(self, path: str, body: Any) -> None:
        self._send("PATCH", path, body).raise_for_status()

    def delete(self, path: str) -> None:
        self._send("DELETE", path, None).raise_for_status()

    def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        # 503: SQLite is locked by one of the server's own services, which Prefect's client also
        # answers by asking again.
        while (answer := self._client.request(method, path, json=body)).status_code == 503:
            time.sleep(1)
        return answer

    def deployment(self, name: str) -> Any:
        """A deployment by `flow/name`."""
        return self.get(f"/deployments/name/{name}")

    def trigger(self, name: str, parameters: dict[str, Any]) -> httpx.Response:
        """What the UI's run form sends."""
        return self.post(
            f"/deployments/{self.deployment(name)['id']}/create_flow_run",
            {"parameters": {"parameters": parameters}, "state": {"type": "SCHEDULED"}},
        )

    def flow_runs(self, **filters: Any) -> list[Any]:
        return list(self.post("/flow_runs/filter", filters).raise_for_status().json())

    def task_runs(self, flow_run: str) -> list[Any]:
        """The task runs of the last attempt, in order."""
        runs = self.post(
            "/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}}
        ).raise_for_status()
        return sorted(runs.json(), key=lambda run: run["expected_start_time"])

    def finished(self, flow_run: str) -> Any:
        """The flow run's final state, and its task runs', waited for."""
        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        self.until(lambda: self.get(f"/flow_runs/{flow_run}")["state"]["type"] in final)
        # States of task runs travel as events and arrive a moment later.
        self.until(lambda: all(run["state_type"] in final for run in self.task_runs(flow_run)))
        return self.get(f"/flow_runs/{flow_run}")["state"]

    @staticmethod
    def until(condition: Callable[[], Any]) -> Any:
        """Wait for a true value and return it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.3)
        pytest.fail("waited in vain")
