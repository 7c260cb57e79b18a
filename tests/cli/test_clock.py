"""The time that is left in all, and a line now and then where there are no bars."""

from __future__ import annotations

import io
import time
from pathlib import Path

from rich.console import Console

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.cli.clock import RunClock, expected_of, heartbeat, spoken
from rldecoder.cli.progress import RichReporter
from rldecoder.config.run import load_run_config
from rldecoder.run import Run
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT


def test_the_time_left_follows_what_is_done() -> None:
    time_now = [100.0]
    clock = RunClock({"a": 60.0, "b": 120.0}, now=lambda: time_now[0])
    assert clock.line() == "a, 0 s so far, about 3 min left in all"
    reporter = RichReporter(Console(file=io.StringIO()))
    reporter.clock = clock
    with reporter.track("train a", total=4, unit="tok") as bar:
        time_now[0] += 30
        bar.advance(2, note="fvu 0.5")
        assert clock.line() == "a 50%, fvu 0.5, 30 s so far, about 2 min left in all"
    time_now[0] += 30
    clock.done("a")
    assert clock.line() == "b, 60 s so far, about 2 min left in all"
    assert clock.left() == 120
    time_now[0] += 1000
    clock.done("elsewhere")  # a stage that was there already
    clock.done("b")
    assert clock.left() == 0
    assert RunClock({}).left() is None
    assert "left" not in RunClock({}).line()


def test_spoken() -> None:
    assert [spoken(s) for s in (5, 89, 700, 12_000)] == ["5 s", "89 s", "12 min", "3 h 20 min"]


def test_a_plain_log_has_a_heartbeat_and_a_terminal_has_none() -> None:
    clock = RunClock({"train_sae": 60.0})
    for terminal, lines in ((False, 1), (True, 0)):
        said = io.StringIO()
        console = Console(file=said, force_terminal=terminal)
        with heartbeat(console, clock, every=0.02):
            until = time.monotonic() + 5
            while "train_sae" not in said.getvalue() and not terminal and time.monotonic() < until:
                time.sleep(0.01)
        assert said.getvalue().count("left in all") >= lines
        assert terminal == (said.getvalue() == "")


def test_only_what_is_to_be_built_is_expected(tmp_path: Path) -> None:
    run = Run(load_run_config(ROOT / "configs" / "debug.yaml"), ArtifactStore(tmp_path))
    assert list(expected_of(run, None)) == [stage.name for stage in STAGES]
    assert list(expected_of(run, "baselines")) == ["sync_tokenizer", "ingest", "baselines"]
