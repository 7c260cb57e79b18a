"""A stage in its own process: results, errors and progress come back; nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.devices import FAKE_DEVICES, DeviceLease, lease_device
from rldecoder.errors import DamagedFileError, GateFailedError, InterruptedRunError, NoResourceError
from rldecoder.reporting import Bar
from rldecoder.runner import StageRun, plan
from tasks import stage_process
from tasks.stage_process import StageProcessError, run_in_process
from tests.conftest import ROOT

CPU = DeviceLease("cpu", (), "CPU")
Act = Callable[..., StageRun]

# The stand-in for tasks.stage_worker: reads the request, gets `say` and `request`, runs the test's
# own lines.
PROLOGUE = """
import json, os, sys, time
request = json.load(sys.stdin)
stream = os.fdopen(request["events_fd"], "w")
def say(event, **values):
    print(json.dumps({"event": event, **values}), file=stream, flush=True)
result = {"ref": {"kind": "k", "stage": "ingest", "digest": "d"}, "reused": False, "verdict": None,
          "caveats": ["one"], "metrics": {"m": 1.5}, "wall_seconds": 2.0}
"""


class Recorder:
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[object] = []

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        self.lines.append(("open", description, total, unit, done))
        yield self
        self.lines.append("close")

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.lines.append((amount, note))

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.lines.append((stage, step, dict(values)))

    def note(self, message: str) -> None:
        self.lines.append(message)

    def alert(self, message: str) -> None:
        self.lines.append(("alert", message))


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return load_run_config(ROOT / "configs" / "debug.yaml")


@pytest.fixture
def act(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Act]:
    """Calls `run_in_process` with a stand-in worker made of the given lines."""

    def call(code: str, report: object = None, lease: DeviceLease = CPU) -> StageRun:
        monkeypatch.setattr(stage_process, "WORKER", (sys.executable, "-c", PROLOGUE + code))
        return run_in_process(
            run, "ingest", {}, store=ArtifactStore(tmp_path / "store"),
            report=report or Recorder(), lease=lease,
        )  # fmt: skip

    before = set(psutil.Process().children())
    yield call
    left = set(psutil.Process().children()) - before
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


def test_the_result_comes_back_whole(act: Act) -> None:
    result = act('say("result", values=result)')
    assert result.ref.stage == "ingest"
    assert (result.caveats, result.metrics, result.wall_seconds) == (("one",), {"m": 1.5}, 2.0)


def test_reports_are_replayed_in_order(act: Act) -> None:
    report = Recorder()
    act(
        'say("open", bar=0, description="train", total=10, unit="tok", done=4)\n'
        'say("advance", bar=0, amount=2, note="loss 1")\n'
        'say("close", bar=0)\n'
        'say("metrics", stage="ingest", step=3, values={"loss": 0.5})\n'
        'say("note", message="n")\nsay("alert", message="a")\nsay("result", values=result)',
        report,
    )
    assert report.lines == [
        ("open", "train", 10, "tok", 4), (2, "loss 1"), "close",
        ("ingest", 3, {"loss": 0.5}), "n", ("alert", "a"),
    ]  # fmt: skip


def test_the_child_sees_the_leased_device_only(act: Act) -> None:
    report = Recorder()
    lease = DeviceLease("cpu", ("GPU-7",), "fake", {"CUDA_VISIBLE_DEVICES": "GPU-7"})
    act(
        'say("note", message=os.environ["CUDA_VISIBLE_DEVICES"] + request["device"])\n'
        'say("result", values=result)',
        report,
        lease,
    )
    assert report.lines == ["GPU-7cpu"]


@pytest.mark.parametrize(
    ("line", "error", "text"),
    [
        ('type="DamagedFileError", parts=["what", "why", "mend"]', DamagedFileError,
         "what why mend"),
        ('type="GateFailedError", parts=["no", "", ""]', GateFailedError, "no"),
        ('type="InterruptedRunError", parts=["no", "", ""]', InterruptedRunError, "no"),
        ('type="KeyError", parts=None, message="KeyError: x", traceback="line 7"',
         StageProcessError, "KeyError"),
        # The name of a class is data: it selects among our own errors and nothing else.
        ('type="annotations", parts=["a", "", ""], message="annotations: m", traceback="t"',
         StageProcessError, "annotations"),
    ],
)  # fmt: skip
def test_errors_come_back_as_what_they_were(
    act: Act, line: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        act(f'say("error", {line})')
    assert type(caught.value) is error


def test_a_crash_keeps_the_end_of_its_output_for_the_report(act: Act) -> None:
    with pytest.raises(StageProcessError, match="status 5") as caught:
        act('print("last words", flush=True)\nos._exit(5)')
    assert caught.value.__notes__ == ["last words"]
    assert caught.value.exit_code == 70


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_child_that_was_stopped_is_an_interruption(act: Act, number: int) -> None:
    with pytest.raises(InterruptedRunError, match="was stopped"):
        act(f"""
import signal
signal.signal({number}, signal.SIG_DFL)
os.kill(os.getpid(), {number})
""")


def test_a_process_killed_by_the_system_is_a_lack_of_memory(act: Act) -> None:
    with pytest.raises(NoResourceError, match="memory"):
        act("os.kill(os.getpid(), 9)")


def test_an_interruption_here_ends_the_child_and_closes_its_bars(act: Act) -> None:
    class Interrupting(Recorder):
        def note(self, message: str) -> None:
            raise KeyboardInterrupt

    report, started = Interrupting(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        act(
            'say("open", bar=0, description="d", total=1, unit="u", done=0)\n'
            'say("note", message="n")\ntime.sleep(60)',
            report,
        )
    assert time.monotonic() - started < 10
    assert report.lines[-1] == "close"


HOLDER = """
import sys
from pathlib import Path
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import load_run_config
from rldecoder.devices import lease_device
from rldecoder.reporting import SilentReporter
from tasks import stage_process
stage_process.WORKER = (sys.executable, "-c", sys.argv[3])
folder = Path(sys.argv[1])
with lease_device("cuda", folder / "locks") as lease:
    stage_process.run_in_process(
        load_run_config(sys.argv[2]), "ingest", {}, store=ArtifactStore(folder / "store"),
        report=SilentReporter(), lease=lease,
    )
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_kill_9_of_the_parent_ends_the_stage_and_frees_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAKE_DEVICES, "GPU-only")
    pid_file = tmp_path / "pid"
    stage = (
        f"import os, time; open({str(pid_file)!r} + '.new', 'w').write(str(os.getpid())); "
        f"os.rename({str(pid_file)!r} + '.new', {str(pid_file)!r}); time.sleep(60)"
    )
    config = ROOT / "configs" / "debug.yaml"
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), str(config), stage], cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 120
        while not pid_file.exists() and time.monotonic() < deadline:
            assert parent.poll() is None
            time.sleep(0.1)
        with (
            pytest.raises(NoResourceError),
            lease_device("cuda", tmp_path / "locks", timeout_seconds=0),
        ):
            pass
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    with lease_device("cuda", tmp_path / "locks", timeout_seconds=10) as lease:
        assert lease.uuids == ("GPU-only",)
    pid = int(pid_file.read_text())  # a zombie has ended: not every init collects it at once
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_real_stage_gives_the_same_artifact_in_its_own_process(
    run: RunConfig, tmp_path: Path
) -> None:
    store, report = ArtifactStore(tmp_path), Recorder()
    lease = DeviceLease("cpu", ("GPU-x",), "fake", {"CUDA_VISIBLE_DEVICES": "GPU-x"})
    result = run_in_process(run, "sync_tokenizer", {}, store=store, report=report, lease=lease)
    assert result.ref == plan(run)["sync_tokenizer"]
    assert not result.reused
    assert store.verify(result.ref).metrics == result.metrics
