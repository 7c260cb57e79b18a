"""The runner on two invented stages: reuse, gates, caveats, interruption, bad metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from rldecoder import runner
from rldecoder.artifacts.base import Artifact, Plain
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.base import OnFail, StageConfig, free
from rldecoder.config.executor import ExecutorConfig
from rldecoder.errors import BadInputError, GateFailedError, NumericalError
from rldecoder.reporting import SilentReporter
from rldecoder.stages.context import Output, Stage, StageContext
from rldecoder.stages.inputs import Nothing


class MakeConfig(StageConfig):
    """Invented."""

    size: int = 3
    workers: int = free(1)


class GateConfig(StageConfig):
    """Invented."""

    limit: int = 5
    on_fail: OnFail = free("stop")


class FakeRun:
    """What the runner reads of a RunConfig."""

    name = "fake"
    seed = 0
    threads = None
    executor = ExecutorConfig()
    # Nothing of others is brought along.
    label_features = SimpleNamespace(imported=None)
    train_sae = SimpleNamespace(pretrained=None, in_team=False)

    def __init__(self, **stages: StageConfig) -> None:
        self._stages = {"make": MakeConfig(), "gate": GateConfig(), "use": MakeConfig()} | stages

    def stage(self, name: str) -> StageConfig:
        """The config of one stage."""
        return self._stages[name]


calls: list[str] = []
crash_once: list[str] = []


class Data(Artifact):
    """Invented."""

    stage, kind = "make", "data"
    data = Plain("data.txt")


class Report(Artifact):
    """Invented."""

    stage, kind = "gate", "report"
    report = Plain("report.json")


class Result(Artifact):
    """Invented."""

    stage, kind = "use", "result"
    caveats_file = Plain("caveats.txt")


class GateInputs(NamedTuple):
    """Of the gate."""

    data: Data


class UseInputs(NamedTuple):
    """Of the last stage."""

    data: Data
    report: Report


@dataclass(frozen=True)
class Invented(Stage):
    """A stage whose room is a function of this file."""

    room: Callable[[Any, Any, StageContext], Output] = field(kw_only=True)

    @property
    def module(self) -> str:
        """Here."""
        return __name__

    def run(self, inputs: Any, config: StageConfig, ctx: StageContext) -> Output:
        """Call it."""
        return self.room(inputs, config, ctx)


def make(inputs: Nothing, config: MakeConfig, ctx: StageContext) -> Output:
    """Writes a file; keeps progress; crashes when the test asks for it."""
    calls.append("make")
    mark = ctx.progress / "half"
    resumed = mark.exists()
    mark.write_text("x")
    if crash_once:
        raise KeyboardInterrupt(crash_once.pop())
    Data.data.path(ctx.out).write_text("x" * config.size)
    return Output({"size": config.size, "resumed": resumed})


def gate(inputs: GateInputs, config: GateConfig, ctx: StageContext) -> Output:
    """Fails when the data is longer than the limit."""
    calls.append("gate")
    size = len(inputs.data.data.read_text())
    Report.report.path(ctx.out).write_text("{}")
    if size > config.limit:
        return Output({"size": size}, "fail", (f"{size} exceeds {config.limit}",))
    return Output({"size": size}, "pass")


def use(inputs: UseInputs, config: MakeConfig, ctx: StageContext) -> Output:
    """Reads both."""
    calls.append("use")
    Result.caveats_file.path(ctx.out).write_text("\n".join(ctx.caveats))
    return Output({"n": 1})


TABLE = (
    Invented(Data, 1, Nothing, room=make),
    Invented(Report, 1, GateInputs, gate=True, room=gate),
    Invented(Result, 1, UseInputs, room=use),
)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the real stages by the three above."""
    calls.clear()
    crash_once.clear()
    monkeypatch.setattr(runner, "STAGES", TABLE)
    monkeypatch.setattr(runner, "stage_named", lambda name: {s.name: s for s in TABLE}[name])


def pipeline(tmp_path: Path, run: Any, **kwargs: Any) -> list[runner.StageRun]:
    """Run all three in a fresh store object, as a new process would."""
    return runner.run_pipeline(
        run, store=ArtifactStore(tmp_path), report=kwargs.pop("report", SilentReporter()), **kwargs
    )


def test_second_run_does_no_work_and_digests_were_known_before(tmp_path: Path) -> None:
    planned = runner.plan(FakeRun())  # type: ignore[arg-type]
    first = pipeline(tmp_path, FakeRun())
    assert calls == ["make", "gate", "use"]
    second = pipeline(tmp_path, FakeRun())
    assert calls == ["make", "gate", "use"]
    assert [r.reused for r in first] == [False] * 3
    assert [r.reused for r in second] == [True] * 3
    assert {r.ref.stage: r.ref for r in second} == planned


def test_free_fields_do_not_rebuild_and_others_rebuild_downstream(tmp_path: Path) -> None:
    pipeline(tmp_path, FakeRun())
    pipeline(tmp_path, FakeRun(make=MakeConfig(workers=8)))
    assert calls == ["make", "gate", "use"]
    pipeline(tmp_path, FakeRun(gate=GateConfig(limit=4)))
    assert calls == ["make", "gate", "use", "gate", "use"]


def test_damaged_artifact_is_rebuilt_and_what_follows_is_reused(tmp_path: Path) -> None:
    first = pipeline(tmp_path, FakeRun())
    (ArtifactStore(tmp_path).path(first[0].ref) / "data.txt").write_text("y")
    report = SilentReporter()
    second = pipeline(tmp_path, FakeRun(), report=report)
    assert [r.reused for r in second] == [False, True, True]
    assert any("moved to" in note for note in report.notes)


def test_failed_gate_stops_but_publishes(tmp_path: Path) -> None:
    run = FakeRun(gate=GateConfig(limit=2))
    for _ in range(2):  # the second time the failed report is reused, and still stops the run
        with pytest.raises(GateFailedError, match="3 exceeds 2"):
            pipeline(tmp_path, run)
    assert calls == ["make", "gate"]
    store = ArtifactStore(tmp_path)
    ref = runner.plan(run)["gate"]  # type: ignore[arg-type]
    assert store.verify(ref).verdict == "fail"
    refs = runner.plan(run)  # type: ignore[arg-type]
    with pytest.raises(GateFailedError, match="refuses to run"):
        runner.run_stage(run, "use", refs, store=store, report=SilentReporter())  # type: ignore[arg-type]


def test_warned_gate_marks_everything_after_it(tmp_path: Path) -> None:
    with pytest.raises(GateFailedError):
        pipeline(tmp_path, FakeRun(gate=GateConfig(limit=2)))
    results = pipeline(tmp_path, FakeRun(gate=GateConfig(limit=2, on_fail="warn")))
    assert calls == ["make", "gate", "use"]  # on_fail alone rebuilds nothing
    assert results[2].caveats == ("gate: 3 exceeds 2",)
    store = ArtifactStore(tmp_path)
    assert "exceeds" in (store.path(results[2].ref) / "caveats.txt").read_text()


def test_interrupted_stage_finds_its_progress(tmp_path: Path) -> None:
    crash_once.append("stop")
    with pytest.raises(KeyboardInterrupt):
        pipeline(tmp_path, FakeRun())
    results = pipeline(tmp_path, FakeRun())
    assert results[0].metrics["resumed"] is True
    assert ArtifactStore(tmp_path).manifest(results[0].ref).resumed


def test_two_runs_at_once_build_each_artifact_once(tmp_path: Path) -> None:
    threads = [threading.Thread(target=pipeline, args=(tmp_path, FakeRun())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == ["gate", "make", "use"]


def test_nan_metric_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = replace(TABLE[0], room=lambda *_: Output({"kl": float("nan")}))
    monkeypatch.setattr(runner, "STAGES", (bad,))
    monkeypatch.setattr(runner, "stage_named", lambda name: bad)
    with pytest.raises(NumericalError, match="kl = nan"):
        pipeline(tmp_path, FakeRun())
    assert not list((tmp_path / "make").glob("*/manifest.json"))


def test_stage_without_its_inputs_is_refused(tmp_path: Path) -> None:
    refs: dict[str, ArtifactRef] = {}
    with pytest.raises(BadInputError, match="cannot run yet"):
        runner.run_stage(
            FakeRun(), "gate", refs, store=ArtifactStore(tmp_path), report=SilentReporter()  # type: ignore[arg-type]
        )  # fmt: skip


def test_changed_source_under_same_version_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline(tmp_path, FakeRun())
    assert not any(result.older_code for result in pipeline(tmp_path, FakeRun()))
    monkeypatch.setattr(runner.provenance, "source_digest", lambda module: "changed")
    assert all(result.older_code for result in pipeline(tmp_path, FakeRun()))
