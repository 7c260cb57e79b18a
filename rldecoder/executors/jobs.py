"""Work in shards, as everything here says it: how it splits, one shard, and what joins them.

- **Split**: `ShardSettings.shards` names the shards, of the settings alone. Most work is a row of
  items, and splits into runs of them (`Runs`).
- **One shard**: a `ShardWorker` holds what all shards need (a model, say) and computes any of
  them: a pure function of its settings and the shard's number. Its file is published as it is,
  or, with a `TensorWorker`, holds tensors for the stage to read.
- **Join**: `StageShards.results` reads the files in the order of their numbers, whoever computed
  them and in whichever order. So sums round the same everywhere.

A `Job` is the work in words, so that another process can do it: names, paths and JSON, nothing
that would have to be unpickled. Finished files are sealed in the stage's progress folder one by
one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from rldecoder import files, sealed
from rldecoder.reporting import Advance, Note

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Result = TypeVar("Result")
Measured = dict[str, float]
"""Sums that a worker keeps of its own work, such as tokens and seconds; several are added up."""

OURS: tuple[str, ...] = ("rldecoder.",)
"""Packages whose classes a job may name."""


def named(place: str) -> object:
    """What `module:name` is; None where the module is none of this package's."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name) if module.startswith(OURS) else None


class ShardFile(NamedTuple):
    """A shard from outside: the file that it becomes, and how much work it is."""

    name: str
    size: float
    """In the unit of the progress bar."""


class ShardSettings(BaseModel, ABC):
    """All that a worker needs to know, and how the work splits; paths are readable everywhere."""

    model_config = ConfigDict(frozen=True)

    @abstractmethod
    def shards(self) -> Sequence[ShardFile]:
        """The shards by number."""

    def batching(self) -> str:
        """What no digest covers and yet may change how a shard rounds, such as the size of
        batches: a run that goes on with another takes up no shard."""
        return ""


class Runs(ShardSettings):
    """Work on a row of items (tokens, places, latents) that splits into runs of them."""

    name: str
    """Of the files, before their numbers."""
    ends: tuple[int, ...]
    """Number of the item after each shard's last one."""

    def bounds(self, number: int) -> tuple[int, int]:
        """A shard's first item, and the one after its last."""
        return self.ends[number - 1] if number else 0, self.ends[number]

    def shards(self) -> Sequence[ShardFile]:
        """See `ShardSettings.shards`; their size is in items."""
        bounds = map(self.bounds, range(len(self.ends)))
        return [
            ShardFile(f"{self.name}-{number:05d}.safetensors", end - first)
            for number, (first, end) in enumerate(bounds)
        ]


def even_ends(total: int, size: int) -> tuple[int, ...]:
    """The ends of runs of `size` items; the last one is what is left of the total."""
    return tuple(min(first + size, total) for first in range(0, total, size))


def whole_ends(names: Sequence[int], size: int) -> tuple[int, ...]:
    """The ends of runs of at least `size` items (the last may be less) that part no equal names."""
    ends = [0]
    for end in range(1, len(names) + 1):
        if end == len(names) or (end - ends[-1] >= size and names[end] != names[end - 1]):
            ends.append(end)
    return tuple(ends[1:])


Settings = TypeVar("Settings", bound=ShardSettings)


def as_tensor(text: str) -> Tensor:
    """A text as bytes, for a shard of tensors."""
    import numpy as np
    import torch

    return torch.from_numpy(np.frombuffer(bytearray(text.encode()), np.uint8))


def as_text(tensor: Tensor) -> str:
    """What `as_tensor` was given."""
    return bytes(tensor.numpy()).decode()


class ShardWorker(ABC, Generic[Settings, Result]):
    """Computes shards; made once a process.

    Args:
        settings: all that it needs to know; paths in it are readable on every machine.
        device: where models go.
        note: receives a line for the user.
    """

    settings_type: ClassVar[type[ShardSettings]]
    """Class of `settings`, to read them from JSON."""
    unit: ClassVar[str] = "tokens"
    """Of the shards' sizes, for people."""

    def __init__(self, settings: Settings, device: torch.device, note: Note) -> None:
        self.settings, self.device, self.note = settings, device, note

    def facts(self) -> Mapping[str, int]:
        """What the stage wants to know of a model that only its workers have loaded."""
        return {}

    def measured(self) -> Measured:
        """Sums over all that this worker has computed."""
        return {}

    @abstractmethod
    def compute(self, number: int, advance: Advance) -> Result:
        """The content of a shard; `advance` is told of parts of its size as they are done."""

    @abstractmethod
    def write(self, path: Path, result: Result) -> str:
        """Write it, whole or not at all (`rldecoder.files.aside`); returns the file's SHA-256.

        Called in another thread while the next shard is computed.
        """


AnyWorker = ShardWorker[Any, Any]


class TensorWorker(ShardWorker[Settings, Result]):
    """Its shards are named tensors."""

    @classmethod
    @abstractmethod
    def pack(cls, result: Result) -> Mapping[str, Tensor]:
        """The content of a shard as tensors on the CPU."""

    @classmethod
    @abstractmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Result:
        """What `pack` was given."""

    def write(self, path: Path, result: Result) -> str:
        """See `ShardWorker.write`."""
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in self.pack(result).items()}
        with files.aside(path) as draft:
            save_file(tensors, draft)
            return files.hash_file(draft)

    @classmethod
    def read(cls, path: Path) -> Result:
        """The content of a shard that was written."""
        from safetensors.torch import load_file

        return cls.unpack(load_file(path))


class Job(BaseModel):
    """Work in shards, as one process tells it another."""

    model_config = ConfigDict(frozen=True)

    worker: str
    """`module:Class` of a `ShardWorker` of this package."""
    settings: str
    """Its settings, as JSON."""
    files: tuple[ShardFile, ...]
    """The shards by number."""
    folder: Path
    """Where finished files are kept."""
    owner: str
    """Whose they are (`StageContext.owner`): another's are not taken up."""
    reads: tuple[Path, ...] = ()
    """Folders that a worker must be able to read."""

    @property
    def module(self) -> str:
        """The module of the worker's class."""
        return self.worker.partition(":")[0]

    def path(self, number: int) -> Path:
        """A shard's file."""
        return self.folder / self.files[number].name

    def seal(self, number: int, sha256: str) -> None:
        """Keep a file that was just written."""
        sealed.seal_file(self.path(number), owner=self._owner_of(number), sha256=sha256)

    def is_finished(self, number: int, note: Note) -> bool:
        """Whether a shard's file is there and nothing changed it since; else that is noted."""
        return sealed.is_intact(self.path(number), owner=self._owner_of(number), note=note)

    def unfinished(self, note: Note) -> list[int]:
        """Numbers of the shards that are still to be done."""
        return [n for n in range(len(self.files)) if not self.is_finished(n, note)]

    def open_worker(self, device: torch.device, note: Note) -> AnyWorker:
        """Make the worker, in this process.

        Raises:
            ValueError: it is no class of this package.
        """
        kind = named(self.worker)
        if not (isinstance(kind, type) and issubclass(kind, ShardWorker)):
            raise ValueError(f"{self.worker!r} is no shard worker of this package")
        settings = kind.settings_type.model_validate_json(self.settings)
        worker: AnyWorker = kind(settings, device, note)
        return worker

    def _owner_of(self, number: int) -> str:
        return f"{self.owner} {self.files[number].name}"


def make_job(
    worker: type[ShardWorker[Settings, Any]],
    settings: Settings,
    *,
    folder: Path,
    owner: str,
    reads: Sequence[Path] = (),
) -> Job:
    """Say what the work is; paths are made absolute, for other processes stand elsewhere."""
    return Job(
        worker=f"{worker.__module__}:{worker.__qualname__}",
        settings=settings.model_dump_json(),
        files=tuple(settings.shards()),
        folder=folder.absolute(),
        owner=owner,
        reads=tuple(path.absolute() for path in reads),
    )


class Bench:
    """One worker at work: while it computes a shard, the one before is written.

    At most two shards are in memory. A shard that could not be written raises at the next call.

    Args:
        worker: the job's, where this process has one.
    """

    def __init__(
        self, job: Job, device: torch.device, note: Note, worker: AnyWorker | None = None
    ) -> None:
        self.job, self.worker = job, worker or job.open_worker(device, note)
        # Encoding and the disk overlap the next shard's computation.
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._written: tuple[int, Future[None]] | None = None

    def do(self, number: int, advance: Advance) -> list[int]:
        """Compute a shard; returns the numbers of those that were finished meanwhile."""
        result = self.worker.compute(number, advance)
        finished = self.settle()
        self._written = number, self._writer.submit(self._write, number, result)
        return finished

    def settle(self) -> list[int]:
        """Wait until what was computed is written; its number."""
        if self._written is None:
            return []
        number, written = self._written
        self._written = None
        written.result()
        return [number]

    def close(self) -> None:
        """Wait for what is being written, whatever came of it."""
        self._writer.shutdown(wait=True)

    def _write(self, number: int, result: Any) -> None:
        self.job.seal(number, self.worker.write(self.job.path(number), result))
