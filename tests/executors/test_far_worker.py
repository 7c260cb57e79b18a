"""A worker of a cluster, without the cluster: what it refuses, and how it says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rldecoder.devices import FAKE_DEVICES, LEASE_FOLDER, lease_device
from rldecoder.errors import BadInputError
from rldecoder.executors.far_worker import PROBE, Answer, FarWorker, Opening
from rldecoder.executors.jobs import Job
from tests.executors.counting import counting_job, products


def opening(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Opening[Job]:
    """A job as its driver tells it, the probe written."""
    return Opening[Job].of(counting_job(folder, monkeypatch, **changes), threads=1)


def opened(worker: FarWorker, told: Opening[Job]) -> Answer:
    return Answer.model_validate_json(worker.open(told.model_dump_json(), 0.0))


def test_it_does_shards_and_names_those_that_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, worker = opening(tmp_path / "shards", monkeypatch, count=3), FarWorker()
    ready = opened(worker, told)
    assert (ready.failure, ready.facts) == (None, {"factor": 3})
    assert ready.machine.startswith("torch ")
    finished = [Answer.model_validate_json(worker.do(n)).finished for n in range(3)]
    assert finished == [(), (0,), (1,)]  # one is computed while the one before is written
    last = Answer.model_validate_json(worker.settle())
    assert (last.finished, last.measured) == ((2,), {"shards": 3.0})
    assert products(told.job) == [0, 3, 6]


def test_errors_are_answers_with_their_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = opening(tmp_path / "shards", monkeypatch, bad_input=(1,), fault=(2,))
    worker = FarWorker()
    opened(worker, told)
    refused = Answer.model_validate_json(worker.do(1)).failure
    assert refused is not None
    error = refused.known()
    assert isinstance(error, BadInputError)
    assert error.mend == "mend"
    fault = Answer.model_validate_json(worker.do(2)).failure
    assert fault is not None
    assert (fault.known(), fault.type) == (None, "KeyError")
    assert "counting.py" in fault.traceback


def test_other_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = opening(tmp_path / "shards", monkeypatch).model_copy(update={"code": "0" * 64})
    failure = opened(FarWorker(), told).failure
    assert failure is not None
    assert "other code" in failure.message


def test_folders_that_it_does_not_see_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    told = opening(folder, monkeypatch)

    def why(told: Opening) -> str:
        failure = opened(FarWorker(), told).failure
        assert failure is not None
        assert failure.type == "BadInputError"
        assert failure.parts is not None
        return " ".join(failure.parts)

    absent = told.job.model_copy(update={"reads": (tmp_path / "model",)})
    said = why(told.model_copy(update={"job": absent}))
    assert f"does not see {tmp_path / 'model'} of the store" in said
    assert "same path on every machine" in said

    # A folder of the same name on another disk.
    (folder / PROBE).write_text("another machine's")
    assert "another folder of the same name" in why(told)
    (folder / PROBE).unlink()
    assert "missing" in why(told)


def test_a_device_of_the_cluster_and_of_a_run_beside_it_exclude_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray knows what Ray gave out; the lock files know of everybody."""
    monkeypatch.setenv(FAKE_DEVICES, "GPU-a,GPU-b")
    monkeypatch.setenv(LEASE_FOLDER, str(tmp_path / "leases"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # set by the worker, put back by the test
    told = opening(tmp_path / "shards", monkeypatch)
    worker, other = FarWorker(lambda: ["0"]), FarWorker(lambda: ["1"])

    with lease_device("GPU-a", task="a run without Ray"):
        waiting = opened(worker, told)
        assert "GPU-a: a run without Ray" in waiting.busy
        assert opened(other, told).busy == ""
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    assert opened(worker, told).busy == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a"

    # And the other way round: the run finds both taken while the workers live.
    with pytest.raises(Exception, match=r"GPU-a: test/0123.*GPU-b: test/0123"):  # noqa: SIM117
        with lease_device("cuda", timeout_seconds=0):
            pass
    stranger = opened(FarWorker(lambda: ["7"]), told).failure
    assert stranger is not None
    assert "gave this process the devices 7" in stranger.message
