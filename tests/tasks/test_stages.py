"""The tasks: one a stage, what is tried again, and where a stage runs. No server is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed

from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.devices import FAKE_DEVICES, LEASE_FOLDER, DeviceLease
from rldecoder.errors import (
    BadInputError,
    DamagedFileError,
    GateFailedError,
    NoResourceError,
    NumericalError,
    StoreBusyError,
)
from rldecoder.reporting import SilentReporter
from rldecoder.runner import plan
from rldecoder.stages.table import STAGES
from tasks import stages
from tasks.stages import STAGE_TASKS, RunContext, build, is_transient
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return load_run_config(ROOT / "configs" / "debug.yaml")


@pytest.fixture(scope="module")
def planned(run: RunConfig) -> dict[str, ArtifactRef]:
    return plan(run)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Where stages were sent: `("here", device)` or `("process", lease)`."""
    calls: list[Any] = []
    monkeypatch.setenv(LEASE_FOLDER, str(tmp_path / "leases"))
    monkeypatch.setattr(
        stages, "run_stage", lambda *args, device, **named: calls.append(("here", device))
    )
    monkeypatch.setattr(
        stages, "run_in_process", lambda *args, lease, **named: calls.append(("process", lease))
    )
    return calls


def run_context(run: RunConfig, planned: dict[str, ArtifactRef], root: Path) -> RunContext:
    return RunContext(run, ArtifactStore(root), planned, SilentReporter())


def test_every_stage_has_its_task_in_order() -> None:
    assert list(STAGE_TASKS) == [stage.name for stage in STAGES]
    for stage in STAGES:
        task = STAGE_TASKS[stage.name]
        assert task.name == stage.name
        assert task.cache_policy is NO_CACHE
        assert task.tags == {stage.phase}
        assert task.persist_result is False


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError(5, "input/output error"), True),
        (ConnectionResetError(), True),
        (NoResourceError("no device"), True),
        (StoreBusyError("busy"), True),
        (FileNotFoundError(2, "no such file"), False),
        (BadInputError("bad"), False),
        (DamagedFileError("damaged"), False),
        (GateFailedError("no"), False),
        (NumericalError("nan"), False),
        (ValueError("a bug"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, again: bool) -> None:
    assert is_transient(None, None, Failed(data=error)) is again


def test_on_a_machine_without_accelerators_the_flow_does_the_work_and_says_so_once(
    run: RunConfig, planned: dict[str, ArtifactRef], calls: list[Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(FAKE_DEVICES, "")
    here = run_context(run, planned, tmp_path)
    for name in ("sync_tokenizer", "ingest"):
        build(name, {}, here, SilentReporter())
    assert calls == [("here", "cpu")] * 2
    assert isinstance(here.report, SilentReporter)
    assert here.report.notes == ["No accelerator was found. Running on the CPU."]


def test_a_leased_device_means_a_process_of_its_own(
    run: RunConfig, planned: dict[str, ArtifactRef], calls: list[Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(FAKE_DEVICES, "GPU-a")
    build("ingest", {}, run_context(run, planned, tmp_path), SilentReporter())
    ((where, lease),) = calls
    assert where == "process"
    assert isinstance(lease, DeviceLease)
    assert lease.env == {"CUDA_VISIBLE_DEVICES": "GPU-a"}


def test_what_a_cluster_computes_holds_no_device_here(
    calls: list[Any], planned: dict[str, ArtifactRef], tmp_path: Path, monkeypatch: Any
) -> None:
    """Held here, it would be missing among those of the workers: Ray gives out the devices."""
    monkeypatch.setenv(FAKE_DEVICES, "GPU-a")
    far = load_run_config(ROOT / "configs" / "debug.yaml", ["executor.type=ray"])
    assert plan(far) == planned  # the executor is in no digest
    context = run_context(far, planned, tmp_path)
    build("cache_activations", planned, context, SilentReporter())
    assert calls.pop() == ("here", "cpu")
    # Training is done by this machine, whoever computes the shards.
    build("train_sae", planned, context, SilentReporter())
    kind, lease = calls.pop()
    assert kind == "process"
    assert lease.uuids == ("GPU-a",)


def test_a_stage_of_several_processes_holds_a_device_for_each(
    run: RunConfig, planned: dict[str, ArtifactRef], calls: list[Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(FAKE_DEVICES, "GPU-a,GPU-b,GPU-c")
    two = run.model_copy(update={"train_sae": run.train_sae.model_copy(update={"processes": 2})})
    build("train_sae", {}, run_context(two, planned, tmp_path), SilentReporter())
    ((_, lease),) = calls
    assert len(lease.uuids) == len(lease.fds) == 2


def test_what_can_be_reused_waits_for_no_device(
    run: RunConfig, planned: dict[str, ArtifactRef], calls: list[Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(FAKE_DEVICES, "GPU-a")
    here = run_context(run, planned, tmp_path)
    monkeypatch.setattr(here.store, "is_published", lambda ref: True)
    monkeypatch.setattr(here.store, "verify", lambda ref: None)
    build("ingest", {}, here, SilentReporter())
    assert calls == [("here", "cpu")]

    def damaged(ref: ArtifactRef) -> None:
        raise DamagedFileError("damaged")

    monkeypatch.setattr(here.store, "verify", damaged)  # then it has to be built after all
    build("ingest", {}, here, SilentReporter())
    assert calls[1][0] == "process"


def test_the_wait_for_a_device_ends_as_the_run_says(
    run: RunConfig, planned: dict[str, ArtifactRef], calls: list[Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(FAKE_DEVICES, "GPU-a")
    hasty = run.model_copy(update={"device_timeout_seconds": 0.2})
    with (
        stages.lease_device("cuda", task="another"),
        pytest.raises(NoResourceError, match=r"within 0.2 s.*another"),
    ):
        build("ingest", {}, run_context(hasty, planned, tmp_path), SilentReporter())
    assert calls == []


def test_more_devices_than_there_are_are_refused_by_the_first_stage(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not by train_sae alone, whose inputs take hours; and not where a cluster has them."""
    monkeypatch.setenv(FAKE_DEVICES, "GPU-a")
    two = ["device=cuda", "train_sae.processes=2"]
    config = load_run_config(ROOT / "configs" / "debug.yaml", two)
    context = run_context(config, plan(config), tmp_path)
    with pytest.raises(BadInputError, match="2 devices are wanted at once, and 1 would do"):
        build("sync_tokenizer", {}, context, SilentReporter())
    assert calls == []

    config = load_run_config(ROOT / "configs" / "debug.yaml", [*two, "executor.type=ray"])
    context = run_context(config, plan(config), tmp_path)
    build("sync_tokenizer", {}, context, SilentReporter())
    build("train_sae", {}, context, SilentReporter())
    assert [call[0] for call in calls] == ["process", "here"]


def test_a_model_spread_over_devices_is_no_stream_of_several_processes() -> None:
    overrides = [
        "train_sae.processes=2", "train_sae.source=stream", "sync_tokenizer.device_map=auto",
    ]  # fmt: skip
    with pytest.raises(BadInputError, match=r"source is stream, in 2 processes.*device_map is aut"):
        plan(load_run_config(ROOT / "configs" / "debug.yaml", overrides))
