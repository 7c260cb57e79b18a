"""The frozen model elsewhere: a stream's shards by the workers of a cluster.

A worker writes the residuals of a shard into the stage's progress folder; the trainer reads and
removes them. So the disk holds the shards of two windows at most, and a killed trainer takes up
what was finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rldecoder import files, sealed
from rldecoder.data.activations import ActivationBatch
from rldecoder.data.forward import ActivationPass, PassSettings, Shard
from rldecoder.data.shards import SplitSequences
from rldecoder.data.streaming import Advance, ShardSource
from rldecoder.executors.jobs import Job, Note, ShardFile, ShardWorker
from rldecoder.executors.local import Crew
from rldecoder.lm.frozen import FrozenLM


class StreamSettings(PassSettings):
    """The plan is of one split."""

    def files(self, context_length: int) -> list[ShardFile]:
        """The shards; their size is in tokens."""
        return [
            ShardFile(
                f"{shard.split}-{shard.index:05d}.safetensors",
                shard.num_sequences * context_length,
            )
            for shard in self.plan
        ]


class StreamWorker(ShardWorker[StreamSettings, ActivationBatch]):
    """The frozen model's lower blocks."""

    settings_type = StreamSettings

    def __init__(
        self, settings: StreamSettings, device: torch.device, note: Callable[[str], None]
    ) -> None:
        super().__init__(settings, device, note)
        lm = FrozenLM.load(settings.model, device=device, record=settings.record)
        self._forward = ActivationPass(
            lm, settings.hook_layer, settings.micro_batch, note, with_final=False
        )
        self._text = SplitSequences(settings.corpus, settings.plan[0].split)

    def compute(self, number: int, advance: Callable[[float], None]) -> ActivationBatch:
        """A shard's residuals, without sinks."""
        shard = self.settings.plan[number]
        ids = self._text.read(shard.first_sequence, shard.num_sequences)
        return self._forward.shard(torch.from_numpy(ids), shard.first_sequence, advance)

    def write(self, path: Path, result: ActivationBatch) -> str:
        """Ids and bfloat16 residuals; returns the file's SHA-256."""
        tensors = {name: column for name, column in result._asdict().items() if column is not None}
        with files.aside(path) as draft:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
            return files.hash_file(draft)


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
            path = self._job.path(number)
            found = load_file(path)
            yield ActivationBatch(
                found["seq_id"], found["pos"], found["token_id"], found["resid"], None
            )
            files.remove(path)
            files.remove(path.with_name(path.name + sealed.SUFFIX))

    def stop(self) -> None:
        """See `ShardSource.stop`."""
        self._crew.stop()


class _Told:
    """A bar that is one function."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._advance(amount)
