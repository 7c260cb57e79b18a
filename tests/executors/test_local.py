"""Shards in this process: in order, kept as they come, taken up after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rldecoder.executors.jobs import Bench, Job
from rldecoder.executors.local import LocalExecutor
from rldecoder.reporting import SilentBar, SilentReporter
from tests.executors.counting import counting_job, products

CPU = torch.device("cpu")


class Counted(SilentBar):
    """A bar that adds up."""

    total = 0.0

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.total += amount


def finish(job: Job) -> tuple[list[int], float]:
    """Do what is left of a job: which shards that was, and how far the bar moved."""
    todo, bar = job.unfinished(lambda note: None), Counted()
    with LocalExecutor().open(job, device=CPU, report=SilentReporter()) as crew:
        assert crew.facts == {"factor": 3}
        assert crew.run(todo, bar) == {"shards": len(todo)}
    return todo, bar.total


def test_all_shards_are_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = counting_job(tmp_path / "shards", monkeypatch)
    assert finish(job) == ([0, 1, 2, 3, 4, 5], 6.0)
    assert products(job) == [0, 3, 6, 9, 12, 15]
    assert finish(job) == ([], 0.0)


def test_a_changed_file_and_anothers_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = counting_job(tmp_path / "shards", monkeypatch)
    finish(job)
    job.path(4).write_bytes(b"13")
    assert finish(job) == ([4], 1.0)
    other = job.model_copy(update={"owner": "test/4567"})
    assert finish(other)[0] == [0, 1, 2, 3, 4, 5]
    assert products(job) == [0, 3, 6, 9, 12, 15]


def test_what_was_finished_before_an_error_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = counting_job(tmp_path / "shards", monkeypatch, fault=(3,))
    with pytest.raises(KeyError):
        finish(broken)
    assert finish(counting_job(tmp_path / "shards", monkeypatch))[0] == [3, 4, 5]


def test_a_shard_that_cannot_be_written_stops_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = counting_job(tmp_path / "shards", monkeypatch, unwritable=(2,))
    with pytest.raises(OSError, match="No space left"):
        finish(full)
    assert full.unfinished(lambda note: None) == [2, 3, 4, 5]
    # The last one is not waited for by a next one.
    last = counting_job(tmp_path / "last", monkeypatch, count=1, unwritable=(0,))
    with pytest.raises(OSError, match="No space left"):
        finish(last)


@pytest.mark.parametrize("worker", ["os:system", "rldecoder.executors.jobs:Bench"])
def test_a_job_names_shard_workers_of_this_package_only(
    worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = counting_job(tmp_path / "shards", monkeypatch).model_copy(update={"worker": worker})
    with pytest.raises(ValueError, match="no shard worker"):
        Bench(job, CPU, print)
