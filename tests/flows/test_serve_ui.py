"""One command, and everything the UI does: typed form, trigger, retry, schedule. Real server."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.stages.table import STAGES
from tests.flows.ui_client import ROOT, Ui

pytestmark = pytest.mark.slow

DEBUG = "pipeline/pipeline-debug"


@pytest.fixture(scope="module")
def in_two_minutes(ui: Ui, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A second cron schedule of the nightly deployment, so that no test waits for the night.

    Made first and asked about last: meanwhile the other tests run. It fires once an hour: one
    that fires every minute keeps a busy machine busy with itself.
    """
    store = tmp_path_factory.mktemp("nightly")
    parameters = {"config": "debug", "until": "sync_tokenizer", "store": str(store)}
    nightly = ui.deployment("nightly/nightly")
    soon = datetime.now(UTC) + timedelta(minutes=2)
    made = ui.post(
        f"/deployments/{nightly['id']}/schedules",
        [
            {
                "active": True,
                "schedule": {"cron": f"{soon.minute} * * * *", "timezone": "UTC"},
                "max_scheduled_runs": 1,
                "parameters": {"parameters": parameters},
            }
        ],
    ).raise_for_status()
    (schedule,) = made.json()
    return nightly, schedule, ArtifactStore(store)


@pytest.mark.usefixtures("in_two_minutes")
@pytest.mark.parametrize(
    ("name", "model", "fields"),
    [
        (DEBUG, "PipelineParameters", {"config", "overrides", "store", "until"}),
        ("pipeline/pipeline-quickstart", "PipelineParameters", {"config", "until"}),
        ("nightly/nightly", "PipelineParameters", {"config", "until"}),
        ("rl/rl", "RunParameters", {"config", "overrides", "store"}),
        ("review/review", "ReviewParameters", {"config", "reviewer", "count"}),
    ],
)
def test_the_form_is_typed_and_explained(ui: Ui, name: str, model: str, fields: set[str]) -> None:
    deployment = ui.deployment(name)
    form = deployment["parameter_openapi_schema"]["definitions"][model]
    assert fields <= set(form["properties"])
    assert all(entry["description"] for entry in form["properties"].values())
    assert form["additionalProperties"] is False
    assert deployment["enforce_parameter_schema"]
    assert deployment["pull_steps"] == [
        {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}
    ]
    if "until" in fields:
        choices = form["properties"]["until"]["anyOf"][0]["enum"]
        assert choices == [stage.name for stage in STAGES]


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"config": "debug", "untill": "ingest"}, "'untill' was unexpected"),
        ({"config": "debug", "until": "nowhere"}, "is not one of"),
        ({"config": "debug", "overrides": "a=b"}, "is not of type 'array'"),
    ],
)
def test_what_the_form_does_not_know_is_refused(
    ui: Ui, parameters: dict[str, Any], complaint: str
) -> None:
    answer = ui.trigger(DEBUG, parameters)
    assert answer.status_code == 409
    assert complaint in answer.text


def test_a_failed_run_is_retried_and_goes_on_where_it_stopped(ui: Ui, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("no JSON\n")
    parameters = {
        "config": "debug", "store": str(tmp_path), "until": "ingest",
        "overrides": [f"ingest.sources=[{{type: local, paths: [{text}]}}]"],
    }  # fmt: skip
    run = ui.trigger(DEBUG, parameters).raise_for_status().json()["id"]
    assert ui.finished(run)["type"] == "FAILED"
    states = {task["name"]: task["state_name"] for task in ui.task_runs(run)}
    assert states == {"sync_tokenizer": "Completed", "ingest": "Failed"}

    draw = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    rows = ({"text": " ".join(draw.choices(words, k=200))} for _ in range(300))
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    retry = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    answer = ui.post(f"/flow_runs/{run}/set_state", {"state": retry, "force": True})
    assert answer.json()["status"] == "ACCEPT"
    ui.until(lambda: ui.get(f"/flow_runs/{run}")["run_count"] == 2)
    assert ui.finished(run)["type"] == "COMPLETED"
    second = [task for task in ui.task_runs(run) if task["flow_run_run_count"] == 2]
    assert {task["name"]: task["state_name"] for task in second} == {
        "sync_tokenizer": "Reused",
        "ingest": "Completed",
    }


def test_nights_are_scheduled(ui: Ui) -> None:
    deployment = ui.deployment("nightly/nightly")
    assert not deployment["paused"]
    crons = {s["schedule"]["cron"] for s in deployment["schedules"] if s["active"]}
    assert "0 3 * * *" in crons
    # The entry alone proves little: with SQLAlchemy 2.1 such schedules silently never ran.
    at_three = ui.until(
        lambda: [
            run
            for run in ui.flow_runs(deployments={"id": {"any_": [deployment["id"]]}})
            if run["state_type"] == "SCHEDULED" and "T03:00:00" in run["expected_start_time"]
        ]
    )
    assert all(run["auto_scheduled"] for run in at_three)


def test_cron_fires_and_the_nightly_run_leaves_its_table(ui: Ui, in_two_minutes: Any) -> None:
    nightly, schedule, store = in_two_minutes
    nights = {"deployments": {"id": {"any_": [nightly["id"]]}}}

    def mine(run: Any) -> bool:  # and not the one that this test may meet at three o'clock
        return run["parameters"]["parameters"].get("store") == str(store.root)

    started = ui.until(
        lambda: [
            run for run in ui.flow_runs(**nights) if run["state_type"] != "SCHEDULED" and mine(run)
        ]
    )
    ui.patch(f"/deployments/{nightly['id']}/schedules/{schedule['id']}", {"active": False})
    (run,) = started
    assert ui.finished(run["id"])["type"] == "COMPLETED"
    assert run["auto_scheduled"]
    assert len(list(store.root.glob("sync_tokenizer/*/manifest.json"))) == 1
    table = ui.get("/artifacts/nightly/latest")
    assert table["flow_run_id"] == run["id"]
    assert "sync_tokenizer" in table["data"]
