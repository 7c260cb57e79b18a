"""Shards in order in this process; and what every executor offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, ClassVar

from rldecoder.executors.jobs import AnyWorker, Bench, Job, Measured
from rldecoder.executors.teams import TeamTask, supervise
from rldecoder.reporting import Bar, Reporter

if TYPE_CHECKING:
    import torch


class Crew(ABC):
    """Who does a job."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, int]:
        """`ShardWorker.facts`; waits for a first worker."""

    @property
    @abstractmethod
    def num_ready(self) -> int:
        """Workers that can compute now."""

    @abstractmethod
    def run(self, todo: Sequence[int], bar: Bar) -> Measured:
        """Do these shards; each one's file is sealed when it is finished.

        Returns:
            What the workers measured, added up.

        Raises:
            RlDecoderError: a shard cannot be done. The files that are finished stay.
        """

    def stop(self) -> None:  # noqa: B027  (shards here end by themselves)
        """Make a `run` in another thread raise; no further one begins."""


class Executor(ABC):
    """Where shards are computed."""

    is_here: ClassVar[bool] = False
    """Whether that is this process alone: what one pass computes need not go through files."""

    @abstractmethod
    def open(
        self, job: Job, *, device: torch.device, report: Reporter, here: AnyWorker | None = None
    ) -> AbstractContextManager[Crew]:
        """A crew for a job, which goes home at the end of the block.

        Args:
            device: of this process; others use their own.
            here: a worker that this process has already, should it do the job.
        """

    @abstractmethod
    def team(self, task: TeamTask, size: int, *, device: torch.device, report: Reporter) -> str:
        """Have `size` processes do a task together; a team that is lost begins again.

        Args:
            device: of this process. On this machine the members take its kind; on a cluster they
                use their own.

        Returns:
            What the first member returned.

        Raises:
            NoResourceError: there are too few devices, or teams were lost too often.
            RlDecoderError: what a member raised.
        """

    def close(self) -> None:  # noqa: B027  (this process has nothing to let go)
        """Let go what was kept for the next job."""


class LocalExecutor(Executor):
    """One worker, in this process; a team in others beside it.

    Args:
        retries: as `executor.retries`.
    """

    is_here = True

    def __init__(self, retries: int = 0) -> None:
        self.retries = retries

    @contextmanager
    def open(
        self, job: Job, *, device: torch.device, report: Reporter, here: AnyWorker | None = None
    ) -> Iterator[Crew]:
        """See `Executor.open`."""
        bench = Bench(job, device, report.note, here)
        try:
            yield _Alone(bench)
        finally:
            bench.close()

    def team(self, task: TeamTask, size: int, *, device: torch.device, report: Reporter) -> str:
        """See `Executor.team`; on the CPU the members share this process's threads."""
        import torch

        from rldecoder.executors.local_team import LocalAttempt, require_devices

        require_devices(size, device)
        threads = max(1, torch.get_num_threads() // size)
        return supervise(lambda: LocalAttempt(task, size, device, threads), self.retries, report)


class _Alone(Crew):
    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    @property
    def facts(self) -> Mapping[str, int]:
        return self._bench.worker.facts()

    @property
    def num_ready(self) -> int:
        return 1

    def run(self, todo: Sequence[int], bar: Bar) -> Measured:
        for number in todo:
            self._bench.do(number, bar.advance)
        self._bench.settle()
        return self._bench.worker.measured()
