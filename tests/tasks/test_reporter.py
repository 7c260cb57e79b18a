"""The reporter of the Prefect UI, against a stand-in for the server."""

from __future__ import annotations

import logging
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tasks import reporter
from tasks.reporter import PrefectReporter, artifact_key


class Ui:
    """Keeps what would be sent to the server."""

    def __init__(self) -> None:
        self.created: list[tuple[float, str]] = []
        self.updated: list[tuple[float, str]] = []
        self.events: list[dict[str, Any]] = []
        self.silent = False
        self.now = 0.0

    def create(self, progress: float, key: str, description: str) -> Any:
        if self.silent:
            raise httpx.ConnectError("gone")
        self.created.append((progress, key))
        return uuid4()

    def update(self, artifact_id: Any, progress: float, description: str) -> None:
        if self.silent:
            raise httpx.ConnectError("gone")
        self.updated.append((progress, description))

    def emit(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})


@pytest.fixture
def ui(monkeypatch: pytest.MonkeyPatch) -> Ui:
    ui = Ui()
    monkeypatch.setattr(reporter, "create_progress_artifact", ui.create)
    monkeypatch.setattr(reporter, "update_progress_artifact", ui.update)
    monkeypatch.setattr(reporter, "emit_event", ui.emit)
    monkeypatch.setattr(reporter, "get_run_logger", lambda: logging.getLogger("run"))
    monkeypatch.setattr(reporter.time, "monotonic", lambda: ui.now)
    return ui


def test_keys_are_what_prefect_accepts() -> None:
    assert artifact_key("train_sae progress") == "train-sae-progress"
    assert artifact_key("Gate: KL / token") == "gate-kl-token"


def test_a_short_bar_leaves_nothing(ui: Ui) -> None:
    with PrefectReporter("ingest").track("read", 10) as bar:
        bar.advance(10)
    assert ui.created == []


def test_a_long_bar_is_updated_now_and_then_and_ends_complete(ui: Ui) -> None:
    with PrefectReporter("train_sae").track("train", 100, "tok", done=20) as bar:
        for _ in range(80):
            ui.now += 0.5
            bar.advance(1, "loss 2")
    assert ui.created == [(26.0, "07-train-sae-progress")]
    assert len(ui.updated) == 13  # every 3 s of 40, after the first, and the end
    assert ui.updated[-1][0] == 100.0
    assert "100 of 100 tok, 2.0 tok/s. loss 2" in ui.updated[-1][1]


def test_a_bar_without_an_end_is_not_shown(ui: Ui) -> None:
    with PrefectReporter("ingest").track("read", None) as bar:
        ui.now += 60
        bar.advance(1)
    assert ui.created == []


def test_metrics_are_logged_every_ten_seconds(ui: Ui, caplog: pytest.LogCaptureFixture) -> None:
    here = PrefectReporter("train_sae")
    with caplog.at_level(logging.INFO):
        for step in range(21):
            here.metrics("train_sae", step, {"loss": 1 / 3})
            ui.now += 1
    assert [record.getMessage() for record in caplog.records] == [
        f"train_sae step {step}: loss 0.3333" for step in (0, 10, 20)
    ]


def test_an_alert_is_a_warning_and_an_event(ui: Ui, caplog: pytest.LogCaptureFixture) -> None:
    PrefectReporter("train_sae").alert("dead fraction 0.9")
    assert caplog.records[0].levelno == logging.WARNING
    assert ui.events == [
        {
            "event": "rldecoder.drift",
            "resource": {
                "prefect.resource.id": "rldecoder.stage.train_sae",
                "prefect.resource.name": "train_sae",
            },
            "payload": {"message": "dead fraction 0.9"},
        }
    ]


def test_a_silent_server_costs_one_warning_and_no_work(
    ui: Ui, caplog: pytest.LogCaptureFixture
) -> None:
    ui.silent = True
    here = PrefectReporter("train_sae")
    with here.track("train", 100) as bar:
        for _ in range(100):
            ui.now += 5
            bar.advance(1)
    assert here.display(pytest.fail, "called although the server is silent") is None
    assert [r.getMessage() for r in caplog.records] == ["The UI is no longer updated: gone"]


def test_an_error_of_ours_is_not_taken_for_a_silent_server(ui: Ui) -> None:
    with pytest.raises(KeyError):
        PrefectReporter("report").display({}.__getitem__, "absent")
