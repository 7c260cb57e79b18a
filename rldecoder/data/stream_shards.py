"""The frozen model elsewhere: a stream's shards by a cluster's workers, or by several trainers.

A worker writes the residuals of a shard into the stage's progress folder; the trainer reads and
removes them. So the disk holds the shards of two windows at most, and a killed trainer takes up
what was finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rldecoder import files, sealed
from rldecoder.data.activations import ActivationBatch
from rldecoder.data.forward import PassSettings, PassWorker, Shard
from rldecoder.data.streaming import ShardSource
from rldecoder.errors import DamagedFileError
from rldecoder.executors.jobs import Bench, Job, TensorWorker
from rldecoder.executors.local import Crew
from rldecoder.reporting import Advance, Note, Reporter


class StreamWorker(PassWorker, TensorWorker[PassSettings, ActivationBatch]):
    """The frozen model's lower blocks: residuals without sinks."""

    with_final = False

    @classmethod
    def pack(cls, result: ActivationBatch) -> Mapping[str, Tensor]:
        """Ids and bfloat16 vectors."""
        return {name: column for name, column in result._asdict().items() if column is not None}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> ActivationBatch:
        """See `TensorWorker.unpack`."""
        ids = tensors["seq_id"], tensors["pos"], tensors["token_id"]
        return ActivationBatch(*ids, tensors["resid"], tensors.get("final_hidden"))


class TextStreamWorker(StreamWorker):
    """The whole frozen model: final hidden states, too."""

    with_final = True


class ModelElsewhere(ShardSource):
    """Shards of a job of `StreamWorker`; each file is removed when it is read.

    Args:
        crew: open as long as this is used.
    """

    ahead = True

    def __init__(self, crew: Crew, job: Job, note: Note) -> None:
        self._crew, self._job, self._note = crew, job, note

    def compute(self, shards: Sequence[Shard], advance: Advance) -> Iterator[ActivationBatch]:
        """See `ShardSource.compute`."""
        numbers = [shard.index for shard in shards]
        todo = [n for n in numbers if not self._job.is_finished(n, self._note)]
        self._crew.run(todo, _Told(advance))
        for number in numbers:
            yield StreamWorker.read(self._job.path(number))
            _forget(self._job.path(number))

    def stop(self) -> None:
        """See `ShardSource.stop`."""
        self._crew.stop()


class Peers(Protocol):
    """What trainers that share a stream ask of their group."""

    @property
    def rank(self) -> int:
        """From 0."""
        ...

    @property
    def size(self) -> int:
        """Processes in all."""
        ...

    def meet(self) -> None:
        """Wait until all have come here."""
        ...


class ModelShared(ShardSource):
    """Each of several trainers computes its part of a window; all read the whole of it.

    They wait for each other before and after: nobody reads what is not there, or removes what
    somebody has yet to read.
    """

    def __init__(self, bench: Bench, peers: Peers, note: Note) -> None:
        self._bench, self._peers, self._note = bench, peers, note

    @classmethod
    @contextmanager
    def opened(
        cls, job: Job, peers: Peers, device: torch.device, report: Reporter
    ) -> Iterator[ModelShared]:
        """With the model on this process's device, for as long as the block lasts."""
        bench = Bench(job, device, report.note)
        try:
            yield cls(bench, peers, report.note)
        finally:
            bench.close()

    def compute(self, shards: Sequence[Shard], advance: Advance) -> Iterator[ActivationBatch]:
        """See `ShardSource.compute`; of the progress each process shows its own, times all."""
        job, peers = self._bench.job, self._peers
        mine = shards[peers.rank :: peers.size]
        for shard in mine:
            if not job.is_finished(shard.index, self._note):
                self._bench.do(shard.index, lambda done: advance(done * peers.size))
        self._bench.settle()

        peers.meet()
        for shard in shards:
            if not job.is_finished(shard.index, self._note):
                raise DamagedFileError(
                    f"{job.path(shard.index)} is not what another trainer wrote.",
                    "Its seal does not fit it, or it is not to be seen from here.",
                    "Look at the disks and the shared file system, and run again.",
                )
            yield StreamWorker.read(job.path(shard.index))
        peers.meet()
        for shard in mine:
            _forget(job.path(shard.index))
        # In the next epoch a shard may be another's work, who must not take the old file for it.
        peers.meet()


def _forget(path: Path) -> None:
    files.remove(path)
    files.remove(path.with_name(path.name + sealed.SUFFIX))


class _Told:
    """A bar that is one function."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._advance(amount)
