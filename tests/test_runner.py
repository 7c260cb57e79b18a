"""The runner on two invented stages: reuse, gates, caveats, interruption, bad metrics."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rldecoder import runner
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.base import OnFail, StageConfig, free
from rldecoder.errors import BadInputError, GateFailedError, NumericalError
from rldecoder.reporting import SilentReporter
from rldecoder.stages.context import InputArtifact, Stage, StageContext, StageOutput


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

    def __init__(self, **stages: StageConfig) -> None:
        self._stages = {"make": MakeConfig(), "gate": GateConfig(), "use": MakeConfig()} | stages

    def stage(self, name: str) -> StageConfig:
        """The config of one stage."""
        return self._stages[name]


calls: list[str] = []
crash_once: list[str] = []


def make(inputs: Mapping[str, InputArtifact], config: MakeConfig, ctx: StageContext) -> StageOutput:
    """Writes a file; keeps progress; crashes when the test asks for it."""
    calls.append("make")
    mark = ctx.progress / "half"
    resumed = mark.exists()
    mark.write_text("x")
    if crash_once:
        raise KeyboardInterrupt(crash_once.pop())
    (ctx.out / "data.txt").write_text("x" * config.size)
    return StageOutput({"size": config.size, "resumed": resumed})


def gate(inputs: Mapping[str, InputArtifact], config: GateConfig, ctx: StageContext) -> StageOutput:
    """Fails when the data is longer than the limit."""
    calls.append("gate")
    size = len((inputs["make"].path / "data.txt").read_text())
    (ctx.out / "report.json").write_text("{}")
    if size > config.limit:
        return StageOutput({"size": size}, "fail", (f"{size} exceeds {config.limit}",))
    return StageOutput({"size": size}, "pass")


def use(inputs: Mapping[str, InputArtifact], config: MakeConfig, ctx: StageContext) -> StageOutput:
    """Reads both."""
    calls.append("use")
    (ctx.out / "caveats.txt").write_text("\n".join(ctx.caveats))
    return StageOutput({"n": 1})


TABLE = (
    Stage("make", "data", 1, (), make, "prepare"),
    Stage("gate", "report", 1, ("make",), gate, "features", gate=True),
    Stage("use", "result", 1, ("make", "gate"), use, "decoder"),
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
    bad = Stage("make", "data", 1, (), lambda *_: StageOutput({"kl": float("nan")}), "prepare")
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
    monkeypatch.setattr(runner.provenance, "source_digest", lambda module: "changed")
    report = SilentReporter()
    pipeline(tmp_path, FakeRun(), report=report)
    assert sum("code has changed" in note for note in report.notes) == 3
