"""A review whose process ended with `make ui`: its form stays, and its answer is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.api import Api
from flows.ghosts import keep_paused_runs
from flows.review import Verdict
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.interp.review import read_reviews
from rldecoder.interp.review_queue import make_queue
from tests.flows.test_review_flow import feature, labels, publish
from tests.flows.ui_client import Ui

pytestmark = pytest.mark.slow


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
