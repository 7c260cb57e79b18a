"""A review whose process ended with `make ui`: its form stays, and its answer is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.api import Api
from flows.ghosts import keep_paused_runs
from flows.listening import _path, is_deaf, listening
from flows.review import Verdict
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.interp.review import read_reviews
from rldecoder.interp.review_queue import make_queue
from tests.flows.test_review_flow import feature, labels, publish
from tests.flows.ui_client import ROOT, Ui

LISTENS = """
import sys, time
from flows.listening import listening
with listening(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_process_that_is_killed_listens_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path))
    run = "01234567-89ab-cdef-0123-456789abcdef"
    assert not is_deaf(run)  # of which nobody here knows anything
    with listening(run):
        assert not is_deaf(run)
    assert not is_deaf(run)  # it has come to its end
    child = subprocess.Popen([sys.executable, "-c", LISTENS, run], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    assert not is_deaf(run)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert is_deaf(run)
    assert is_deaf(run.upper().replace("-", ""))  # as Prefect reads ids, too
    assert not any(map(is_deaf, ("", "..", "../" * 9 + "etc/passwd", "x\0", "\udcff")))


@pytest.fixture
def ghost(ui: Ui, tmp_path: Path) -> dict[str, Any]:
    """A run as `make ui` leaves it when it ends while a review waits: paused, and no process."""
    store = ArtifactStore(tmp_path)
    ours = labels(feature(8), feature(9, importance=0.01))
    first = publish(store, "label_features", ours)
    second = publish(store, "cluster_features", make_queue(ours, {}, 0))
    key = f"latent-8-{first.digest}-{second.digest}-{'0' * 32}"
    keyset = {part: f"paused-{key}-{part}" for part in ("description", "response", "schema")}
    paused = {
        "type": "PAUSED",
        "name": "Paused",
        "state_details": {
            "pause_timeout": "2999-01-01T00:00:00Z", "pause_reschedule": False,
            "pause_key": key, "run_input_keyset": keyset,
        },
    }  # fmt: skip
    parameters = {"config": "debug", "store": str(store.root), "reviewer": "ann", "count": 1}
    identity = ui.deployment("review/review")["id"]
    run = ui.post(
        f"/deployments/{identity}/create_flow_run",
        {
            "parameters": {"parameters": parameters},
            "state": paused,
        },
    ).raise_for_status()
    ident = run.json()["id"]
    ui.patch(f"/flow_runs/{ident}", {"empirical_policy": {"pause_keys": [key]}})
    schema = Verdict.model_json_schema()
    for name, value in (("schema", schema), ("description", "text")):
        body = {"key": keyset[name], "value": json.dumps(value)}
        ui.post(f"/flow_runs/{ident}/input", body).raise_for_status()
    return {"id": ident, "reviews": tmp_path / "reviews.jsonl"}


@pytest.mark.slow
def test_a_review_from_python_whose_process_is_gone_takes_no_answer(ui: Ui) -> None:
    flow = ui.flow_runs(flows={"name": {"any_": ["review"]}}, limit=1)
    flow_id = flow[0]["flow_id"] if flow else ui.deployment("review/review")["flow_id"]
    paused = {
        "type": "PAUSED",
        "state_details": {"pause_timeout": "2999-01-01T00:00:00Z", "pause_reschedule": False},
    }
    body = {"flow_id": flow_id, "state": paused}
    alive, dead = (ui.post("/flow_runs/", body).raise_for_status().json()["id"] for _ in "ab")
    _path(dead).parent.mkdir(parents=True, exist_ok=True)
    _path(dead).touch()
    with listening(alive):
        answer = ui.post(f"/flow_runs/{dead}/resume", {"run_input": {"verdict": "accept"}})
        assert answer.status_code == 409
        assert "process is gone" in answer.json()["detail"]
        assert ui.get(f"/flow_runs/{dead}")["state"]["type"] == "PAUSED"
        assert any("was ended" in line for line in keep_paused_runs(Api(ui.url, ui.password)))
        assert ui.get(f"/flow_runs/{dead}")["state"]["type"] == "CRASHED"
        assert not _path(dead).exists()
        assert ui.get(f"/flow_runs/{alive}")["state"]["type"] == "PAUSED"
        assert ui.post(f"/flow_runs/{alive}/resume", {}).json()["status"] == "ACCEPT"
    ui.delete(f"/flow_runs/{alive}")


@pytest.mark.slow
def test_the_answer_to_a_ghost_is_kept(ui: Ui, ghost: dict[str, Any]) -> None:
    path = f"/flow_runs/{ghost['id']}"
    assert ui.get(path)["state"]["name"] == "Paused"
    said = list(keep_paused_runs(Api(ui.url, ui.password)))
    assert len(said) == 1
    assert "waits for its answer" in said[0]
    state = ui.get(path)["state"]
    assert (state["type"], state["name"]) == ("PAUSED", "Suspended")
    assert "make ui" in state["message"]
    assert list(keep_paused_runs(Api(ui.url, ui.password))) == []

    answer = {"verdict": "reject", "better_label": "digits", "note": "mine"}
    assert ui.post(f"{path}/resume", {"run_input": answer}).json()["status"] == "ACCEPT"
    assert ui.finished(ghost["id"])["type"] == "COMPLETED"
    (line,) = read_reviews(ghost["reviews"], "abc")
    assert (line.latent, line.accept, line.label, line.note) == (8, False, "digits", "mine")
