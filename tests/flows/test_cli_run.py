"""`rldecoder run` through Prefect: the results of `run_pipeline`, and a graph to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.cli_run import run_with_prefect
from rldecoder import runner
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError, GateFailedError
from rldecoder.reporting import SilentReporter
from rldecoder.runner import StageRun, plan, run_pipeline
from rldecoder.stages.table import STAGES
from tests.flows.ui_client import ROOT, Ui

pytestmark = pytest.mark.slow

UNTIL = "baselines"


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return load_run_config(ROOT / "configs" / "debug.yaml")


@pytest.fixture(scope="module")
def store(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """What `run_pipeline` builds, without Prefect."""
    store = ArtifactStore(tmp_path_factory.mktemp("plain"))
    run_pipeline(run, store=store, report=SilentReporter(), until=UNTIL)
    return store


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Stages that do nothing, or raise what a test puts under their name."""
    import tasks.stages

    trouble: dict[str, list[Any]] = {}

    def run_stage(run: RunConfig, name: str, refs: Any, **named: Any) -> StageRun:
        if trouble.get(name):
            raise trouble[name].pop(0)
        return StageRun(plan(run)[name], False, None, (), {}, 0.0)

    monkeypatch.setattr(tasks.stages, "run_stage", run_stage)
    monkeypatch.setattr(tasks.stages, "show_stage", lambda stage, ref, store: None)
    quick = {
        name: task.with_options(retry_delay_seconds=0)
        for name, task in tasks.stages.STAGE_TASKS.items()
    }
    monkeypatch.setattr("flows.pipeline.STAGE_TASKS", quick)
    return trouble


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    """Those metrics, or files, that no clock decides."""
    timed = ("_per_second", "_seconds", "_bytes", "timing.json")
    return {name: value for name, value in values.items() if not name.endswith(timed)}


def latest(ui: Ui) -> Any:
    """The flow run that was started last."""
    return ui.flow_runs(sort="START_TIME_DESC", limit=1, flows={"name": {"any_": ["pipeline"]}})[0]


def test_digests_and_bytes_equal_those_without_prefect(
    ui: Ui, run: RunConfig, store: ArtifactStore, tmp_path: Path
) -> None:
    other, seen = ArtifactStore(tmp_path), []
    results = run_with_prefect(
        run, store=other, report=SilentReporter(), until=UNTIL,
        on_stage=lambda stage, result: seen.append(stage.name),
    )  # fmt: skip
    assert seen == ["sync_tokenizer", "ingest", "baselines"]
    assert [result.reused for result in results] == [False] * 3
    for result in results:
        ours, plain = other.manifest(result.ref), store.manifest(result.ref)
        assert untimed(ours.files) == untimed(plain.files)
        assert untimed(ours.metrics) == untimed(plain.metrics)
    flow_run = latest(ui)
    assert ui.finished(flow_run["id"])["type"] == "COMPLETED"
    assert {task["state_name"] for task in ui.task_runs(flow_run["id"])} == {"Completed"}


def test_reused_stages_are_seen_as_such_and_the_graph_has_its_edges(
    ui: Ui, run: RunConfig, store: ArtifactStore
) -> None:
    results = run_with_prefect(run, store=store, report=SilentReporter(), until=UNTIL)
    assert all(result.reused for result in results)
    flow_run = latest(ui)
    assert ui.finished(flow_run["id"])["type"] == "COMPLETED"
    tasks = ui.task_runs(flow_run["id"])
    assert [(task["name"], task["state_name"]) for task in tasks] == [
        ("sync_tokenizer", "Reused"), ("ingest", "Reused"), ("baselines", "Reused"),
    ]  # fmt: skip
    names = {task["id"]: task["name"] for task in tasks}
    edges = {
        task["name"]: sorted(names[i["id"]] for i in task["task_inputs"]["refs"]) for task in tasks
    }
    assert edges == {stage.name: sorted(stage.upstream) for stage in STAGES if stage.name in edges}


def test_every_stage_is_one_task_with_the_edges_of_the_stage_graph(
    ui: Ui, run: RunConfig, tmp_path: Path, fake_stages: dict[str, list[Any]]
) -> None:
    run_with_prefect(run, store=ArtifactStore(tmp_path), report=SilentReporter())
    flow_run = latest(ui)
    assert ui.finished(flow_run["id"])["type"] == "COMPLETED"
    tasks = ui.task_runs(flow_run["id"])
    names = {task["id"]: task["name"] for task in tasks}
    graph = [(t["name"], {names[i["id"]] for i in t["task_inputs"]["refs"]}) for t in tasks]
    assert graph == [(stage.name, set(stage.upstream)) for stage in STAGES]


def test_a_gates_verdict_is_the_states_message_and_stops_the_run(
    ui: Ui, run: RunConfig, tmp_path: Path, fake_stages: dict[str, list[Any]]
) -> None:
    fake_stages["gate_sae"] = [GateFailedError("gate_sae said no: fvu 0.9.", "", "Train longer.")]
    with pytest.raises(GateFailedError, match="said no"):
        run_with_prefect(run, store=ArtifactStore(tmp_path), report=SilentReporter())
    flow_run = latest(ui)
    assert ui.finished(flow_run["id"])["type"] == "FAILED"
    last = ui.task_runs(flow_run["id"])[-1]
    assert (last["name"], last["state_name"], last["run_count"]) == ("gate_sae", "Failed", 1)
    assert last["state"]["message"] == "gate_sae said no: fvu 0.9. Train longer."


def test_bad_input_is_not_retried_and_a_failing_disk_is(
    ui: Ui, run: RunConfig, tmp_path: Path, fake_stages: dict[str, list[Any]]
) -> None:
    fake_stages["sync_tokenizer"] = [OSError(5, "input/output error")]
    fake_stages["ingest"] = [BadInputError("The corpus is empty.")]
    with pytest.raises(BadInputError, match="corpus is empty"):
        run_with_prefect(run, store=ArtifactStore(tmp_path), report=SilentReporter())
    flow_run = latest(ui)
    ui.finished(flow_run["id"])
    counts = {t["name"]: (t["run_count"], t["state_type"]) for t in ui.task_runs(flow_run["id"])}
    assert counts == {"sync_tokenizer": (2, "COMPLETED"), "ingest": (1, "FAILED")}


def test_an_interruption_comes_through(
    ui: Ui, run: RunConfig, tmp_path: Path, fake_stages: dict[str, list[Any]]
) -> None:
    fake_stages["ingest"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        run_with_prefect(run, store=ArtifactStore(tmp_path), report=SilentReporter())
    assert ui.finished(latest(ui)["id"])["type"] in ("CRASHED", "FAILED")


def test_an_unknown_stage_is_bad_input(ui: Ui, run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no stage called nowhere"):
        run_with_prefect(
            run, store=ArtifactStore(tmp_path), report=SilentReporter(), until="nowhere"
        )


def test_a_damaged_artifact_is_built_again_not_reused(
    ui: Ui, run: RunConfig, store: ArtifactStore
) -> None:
    ref = runner.plan(run)["ingest"]
    next(store.path(ref).glob("train-*.parquet")).write_bytes(b"damaged")
    # A new store object: the old one remembers that it has verified the file.
    fresh, notes = ArtifactStore(store.root), SilentReporter()
    results = run_with_prefect(run, store=fresh, report=notes, until="ingest")
    assert [result.reused for result in results] == [True, False]
    assert any("damaged" in note for note in notes.notes)
