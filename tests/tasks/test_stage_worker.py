"""What the child writes on the pipe."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rldecoder.config.run import load_run_config
from rldecoder.errors import GateFailedError
from rldecoder.far_reports import FarReporter
from tasks import stage_worker
from tasks.stage_worker import Request, work
from tests.conftest import ROOT


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def request(tmp_path: Path) -> Request:
    run = load_run_config(ROOT / "configs" / "debug.yaml")
    return Request(
        run=run, stage="ingest", refs={}, place=str(tmp_path), mirror=None, device="cpu",
        events_fd=1,
    )  # fmt: skip


def test_many_small_steps_make_few_lines_and_lose_nothing(stream: io.StringIO) -> None:
    reporter = FarReporter(stream)
    with reporter.track("d", 10_000, "it", 5) as bar:
        for _ in range(10_000):
            bar.advance(1, "last")
    sent = lines(stream)
    assert sent[0] == {
        "event": "open", "bar": 0, "description": "d", "total": 10_000, "unit": "it", "done": 5,
    }  # fmt: skip
    steps = [line for line in sent if line["event"] == "advance"]
    assert sum(step["amount"] for step in steps) == 10_000
    assert len(steps) < 50
    assert steps[-1]["note"] == "last"
    assert sent[-1] == {"event": "close", "bar": 0}


def test_a_bar_is_closed_when_the_stage_raises(stream: io.StringIO) -> None:
    with pytest.raises(RuntimeError), FarReporter(stream).track("d", 1):
        raise RuntimeError
    assert lines(stream)[-1]["event"] == "close"


def test_numpy_numbers_are_sent_as_numbers(stream: io.StringIO) -> None:
    values: dict[str, Any] = {"loss": np.float32(0.5)}  # which the type does not allow
    FarReporter(stream).metrics("s", 1, values)
    assert lines(stream)[0]["values"] == {"loss": 0.5}


def test_our_errors_are_sent_in_parts(tmp_path: Path, stream: io.StringIO) -> None:
    assert work(request(tmp_path), FarReporter(stream)) == 2  # ingest without its input
    (error,) = lines(stream)
    assert error["type"] == "BadInputError"
    assert error["parts"][0] == "Stage ingest cannot run yet."


@pytest.mark.parametrize(
    ("raised", "code", "name"),
    [
        (PermissionError(13, "not yours"), 2, "BadInputError"),
        (MemoryError(), 2, "NoResourceError"),
        (GateFailedError("no"), 1, "GateFailedError"),
        (KeyError("x"), 70, "KeyError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_child_says_what_it_was_and_ends_with_its_code(
    tmp_path: Path,
    stream: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    code: int,
    name: str,
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise raised

    monkeypatch.setattr(stage_worker, "run_stage", fail)
    assert work(request(tmp_path), FarReporter(stream)) == code
    (error,) = lines(stream)
    assert error["type"] == name
    assert (error["parts"] is None) == (code == 70)
    assert "Traceback" in error["traceback"]
