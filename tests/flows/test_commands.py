"""The worker looks again at what a run would execute, whatever the server let through."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from flows.commands import PULL_STEPS, default_template, entrypoints, foreign_run
from flows.worker import ForeignCommandError, make_worker

OWN = {"entrypoint": "flows/pipeline.py:pipeline", "pull_steps": PULL_STEPS, "path": None}
EVIL = {"command": "touch /tmp/x"}


def test_the_projects_own_flows_run() -> None:
    assert "flows/review.py:review" in entrypoints()
    assert foreign_run({"job_variables": {}}, OWN, default_template()) == ""
    assert foreign_run({"job_variables": None}, OWN, {}) == ""


@pytest.mark.parametrize(
    ("run", "deployment", "template", "complaint"),
    [
        ({"job_variables": EVIL}, OWN, {}, "command"),
        ({"infrastructure_document_id": "1"}, OWN, {}, "block"),
        ({}, None, {}, "no deployment"),
        ({}, {**OWN, "entrypoint": None}, {}, "no entrypoint"),
        ({}, {**OWN, "entrypoint": "evil.py:flow"}, {}, "no flow of prefect.yaml"),
        ({}, {**OWN, "job_variables": EVIL}, {}, "command"),
        ({}, {**OWN, "path": "/tmp"}, {}, "not the project's folder"),
        ({}, {**OWN, "storage_document_id": "1"}, {}, "block"),
        ({}, {**OWN, "pull_steps": [{"run_shell_script": {}}]}, {}, "pull_steps"),
        ({}, OWN, {"job_configuration": EVIL, "variables": {}}, "job template"),
    ],
)
def test_anything_else_does_not(
    run: dict[str, Any], deployment: Any, template: Any, complaint: str
) -> None:
    assert complaint in foreign_run(run, deployment, template)


def test_the_worker_refuses_before_it_makes_a_job() -> None:
    def record(values: Any) -> Any:
        return SimpleNamespace(model_dump=lambda mode: values, deployment_id="1")

    class Client:
        async def read_deployment(self, identity: str) -> Any:
            return record(OWN)

    job = make_worker().job_configuration
    pool = SimpleNamespace(base_job_template={})
    asked = job.resolve_for_flow_run(
        record({"job_variables": EVIL}), client=Client(), work_pool=pool, worker_name="w"
    )
    with pytest.raises(ForeignCommandError, match="command"):
        asyncio.run(asked)
