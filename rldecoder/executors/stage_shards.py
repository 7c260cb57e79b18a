"""A stage's work in shards: who computes them, and where finished ones are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from rldecoder.executors.jobs import Job, Result, Settings, ShardWorker, TensorWorker, make_job
from rldecoder.executors.local import Crew, Executor
from rldecoder.reporting import Bar, Reporter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StageShards:
    """What a stage gives out.

    Args:
        folder: of what is underway; outlives a killed run.
        owner: whose it is: another's shards are not taken up.
        device: of this process; others use their own.
    """

    executor: Executor
    folder: Path
    owner: str
    device: torch.device
    report: Reporter

    def job(
        self,
        worker: type[ShardWorker[Settings, Any]],
        settings: Settings,
        reads: Sequence[Path],
        part: str = "",
    ) -> Job:
        """The work in words; its files go into the folder `part` of ours, or ours itself.

        Args:
            reads: folders of artifacts that hold what the settings name.
        """
        folder = self.folder / part
        folder.mkdir(parents=True, exist_ok=True)
        owner = " ".join(filter(None, (self.owner, part, settings.batching())))
        return make_job(worker, settings, folder=folder, owner=owner, reads=reads)

    @contextmanager
    def opened(
        self,
        worker: type[TensorWorker[Settings, Result]],
        settings: Settings,
        reads: Sequence[Path],
        part: str,
    ) -> Iterator[OpenShards[Result]]:
        """Workers that keep what they have loaded, for shards that are asked for in turn."""
        job = self.job(worker, settings, reads, part)
        with self.executor.open(job, device=self.device, report=self.report) as crew:
            yield OpenShards(crew, job, worker, self.report)

    def results(
        self,
        worker: type[TensorWorker[Settings, Result]],
        settings: Settings,
        reads: Sequence[Path],
        part: str,
        title: str,
        here: TensorWorker[Settings, Result] | None = None,
    ) -> Iterator[Result]:
        """Do the shards that are not there yet; then what all hold, in order, one in memory at a
        time.

        Args:
            title: of the progress bar.
            here: does the work if this process is to do it, with the models that it has loaded.

        Raises:
            RlDecoderError: a shard cannot be done. Those that are finished stay.
        """
        job = self.job(worker, settings, reads, part)
        numbers = range(len(job.files))
        todo = job.unfinished(self.report.note)
        # Without work nobody is called.
        if todo:
            with self.executor.open(job, device=self.device, report=self.report, here=here) as crew:
                shards = OpenShards(crew, job, worker, self.report)
                shards.run(todo, numbers, title, worker.unit)
        return (worker.read(job.path(number)) for number in numbers)


@dataclass(frozen=True)
class OpenShards(Generic[Result]):
    """A job whose workers are there."""

    crew: Crew
    job: Job
    worker: type[TensorWorker[Any, Result]]
    report: Reporter

    def results(self, numbers: Sequence[int], title: str, unit: str) -> Iterator[Result]:
        """As `StageShards.results`, of some of the shards."""
        self.run(self._unfinished(numbers), numbers, title, unit)
        return map(self.read, numbers)

    def run(self, todo: Sequence[int], of: Sequence[int], title: str, unit: str) -> None:
        """Do shards, under a bar that shows the others as done."""
        total, left = (sum(self.job.files[n].size for n in some) for some in (of, todo))
        with self.report.track(title, total, unit=unit, done=total - left) as bar:
            self.crew.run(todo, bar)

    def finish(self, numbers: Sequence[int], bar: Bar) -> None:
        """Do those of the shards that are not there yet."""
        self.crew.run(self._unfinished(numbers), bar)

    def _unfinished(self, numbers: Sequence[int]) -> list[int]:
        return [n for n in numbers if not self.job.is_finished(n, self.report.note)]

    def read(self, number: int) -> Result:
        """What a finished shard holds."""
        return self.worker.read(self.job.path(number))
