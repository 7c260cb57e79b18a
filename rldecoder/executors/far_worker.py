"""What runs on a machine of the cluster: opens a job, does its shards, and says so in JSON.

Errors are answers, too, so that Ray, which would pickle them, carries texts and numbers alone. Of
Ray this module knows nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from rldecoder import devices, files, provenance
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.executors.jobs import Bench, Job, Measured
from rldecoder.executors.teams import TeamTask
from rldecoder.far_failures import Failure

PROBE = ".seen-from-here"
"""A file of the driver's in the folder of finished shards, which workers must find there."""


W = TypeVar("W", Job, TeamTask)


class Opening(BaseModel, Generic[W]):
    """What a process of the cluster is told first.

    Its type is named where one is made or read: `Opening[Job]`.
    """

    model_config = ConfigDict(frozen=True)

    job: W
    code: str
    """`provenance.source_digest` of the job's module, as the driver has it."""
    probe: str
    """Content of the file PROBE."""
    threads: int
    task: str
    """For the device's lock file: who holds it."""

    @classmethod
    def of(cls, job: W, threads: int) -> Opening[W]:
        """What is so on the driver's machine; puts the file PROBE into the job's folder."""
        probe = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
        files.write_bytes(job.folder / PROBE, probe.encode())
        code = provenance.source_digest(job.module)
        return cls(job=job, code=code, probe=probe, threads=threads, task=job.owner)


class Answer(BaseModel):
    """What a worker says to each call."""

    model_config = ConfigDict(frozen=True)

    finished: tuple[int, ...] = ()
    """Shards whose files are sealed since the last answer."""
    notes: tuple[str, ...] = ()
    measured: Measured = {}
    """Of all that the worker did so far."""
    facts: dict[str, int] = {}
    machine: str = ""
    """Kind of processor, where that decides about rounding."""
    busy: str = ""
    """Why the device cannot be used yet; ask again."""
    failure: Failure | None = None


class FarProcess:
    """A process of the cluster.

    Args:
        device_ids: the accelerators that the cluster's scheduler gave this process; None computes
            on the CPU.
    """

    def __init__(self, device_ids: Callable[[], Sequence[str]] | None = None) -> None:
        self._device_ids = device_ids
        self._device: str | None = None
        self._notes: list[str] = []
        self._held = ExitStack()

    def _answer(self, work: Callable[[], Answer]) -> str:
        try:
            answer = work()
        except Exception as error:  # whatever it is, it is told and not lost with the worker
            answer = Answer(failure=Failure.of(error))
        notes, self._notes = tuple(self._notes), []
        return answer.model_copy(update={"notes": notes}).model_dump_json()

    def _prepare(self, opening: Opening[Any], wait_seconds: float) -> Answer | None:
        """See that code and folders are those of the run, and take the device; else say why not."""
        _check_code(opening)
        _check_folders(opening)

        # Ray keeps account of what Ray gave out; the lock tells of everybody else.
        if self._device is None and self._device_ids is not None:
            try:
                lease = self._held.enter_context(
                    devices.lease_assigned(
                        self._device_ids(), task=opening.task, timeout_seconds=wait_seconds
                    )
                )
            except NoResourceError as error:
                return Answer(busy=f"{here()}: {error.why}")
            os.environ.update(lease.env)  # before CUDA is first used, which reads it once
            self._device = lease.device

        import torch

        torch.set_num_threads(opening.threads)
        return None


class FarWorker(FarProcess):
    """Does shards."""

    def __init__(self, device_ids: Callable[[], Sequence[str]] | None = None) -> None:
        super().__init__(device_ids)
        self._bench: Bench | None = None

    def open(self, opening: str, wait_seconds: float) -> str:
        """Get ready for a job (an `Opening`, as JSON), the first one or another.

        Args:
            wait_seconds: how long to wait for a device that another process holds.
        """
        return self._answer(
            lambda: self._open(Opening[Job].model_validate_json(opening), wait_seconds)
        )

    def do(self, number: int) -> str:
        """Compute a shard, and name those that were finished meanwhile."""
        return self._answer(lambda: self._done(self._ready.do(number, lambda amount: None)))

    def settle(self) -> str:
        """Finish what is being written."""
        return self._answer(lambda: self._done(self._ready.settle()))

    @property
    def _ready(self) -> Bench:
        if self._bench is None:
            raise RuntimeError("no job was opened")
        return self._bench

    def _done(self, finished: Sequence[int]) -> Answer:
        return Answer(finished=tuple(finished), measured=self._ready.worker.measured())

    def _open(self, opening: Opening[Job], wait_seconds: float) -> Answer:
        busy = self._prepare(opening, wait_seconds)
        if busy is not None:
            return busy

        import torch

        if self._bench is not None:
            self._bench.close()
            self._bench = None  # its model goes before another one comes
        device = torch.device(self._device or "cpu")
        self._bench = Bench(opening.job, device, self._notes.append)
        return Answer(facts=dict(self._bench.worker.facts()), machine=machine())


def here() -> str:
    """This process, for people."""
    return f"worker {os.getpid()} on {socket.gethostname()}"


def machine() -> str:
    """What decides about rounding: processor's instructions, and the version of torch."""
    import torch

    return f"torch {torch.__version__} with {torch.backends.cpu.get_cpu_capability()}"


def _check_code(opening: Opening[Any]) -> None:
    found = provenance.source_digest(opening.job.module)
    if found != opening.code:
        raise BadInputError(
            f"The {here()} has other code than the run.",
            f"{opening.job.module} and what it imports hash to {found[:12]} there, and to "
            f"{opening.code[:12]} here.",
            "Install the same version of RL-Decoder on every machine of the cluster.",
        )


def _check_folders(opening: Opening[Any]) -> None:
    """Whether the worker sees the same files: a folder of that name may be another one."""
    folder = opening.job.folder
    for path in (*opening.job.reads, folder):
        if not os.access(path, os.R_OK):
            raise _unseen(path, "There is no such folder, or it cannot be read.")
    try:
        seen = files.read_regular(folder / PROBE).decode()
    except OSError as error:
        raise _unseen(folder, f"What the run wrote there is missing ({error}).") from error
    if seen != opening.probe:
        raise _unseen(folder, "It is another folder of the same name.")
    if not os.access(folder, os.W_OK):
        raise _unseen(folder, "It cannot be written to.")


def _unseen(path: Path, why: str) -> BadInputError:
    return BadInputError(
        f"The {here()} does not see {path} of the store.",
        why,
        "Mount the store at the same path on every machine of the cluster, writable for workers.",
    )
