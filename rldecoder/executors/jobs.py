"""How a stage says what its work in shards is: each shard becomes one file, whoever computes it.

A `ShardWorker` holds what all shards need (a model, say) and computes any of them: a pure function
of its settings and the shard's number. A `Job` is that in words, so that another process can do
it: names, paths and JSON, nothing that would have to be unpickled. Finished files are sealed in
the stage's progress folder one by one; what joins them reads them in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from rldecoder import sealed

if TYPE_CHECKING:
    import torch

Settings = TypeVar("Settings", bound=BaseModel)
Result = TypeVar("Result")
Note = Callable[[str], None]
Advance = Callable[[float], None]
Measured = dict[str, float]
"""Sums that a worker keeps of its own work, such as tokens and seconds; several are added up."""

OURS: tuple[str, ...] = ("rldecoder.",)
"""Packages whose classes a job may name."""


class ShardFile(NamedTuple):
    """A shard from outside: the file that it becomes, and how much work it is."""

    name: str
    size: float
    """In the unit of the progress bar."""


class ShardWorker(ABC, Generic[Settings, Result]):
    """Computes shards; made once a process.

    Args:
        settings: all that it needs to know; paths in it are readable on every machine.
        device: where models go.
        note: receives a line for the user.
    """

    settings_type: ClassVar[type[BaseModel]]
    """Class of `settings`, to read them from JSON."""

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

    def open_worker(self, device: torch.device, note: Note) -> ShardWorker[Any, Any]:
        """Make the worker, in this process.

        Raises:
            ValueError: it is no class of this package.
        """
        module, _, name = self.worker.partition(":")
        kind = getattr(import_module(module), name) if module.startswith(OURS) else None
        if not (isinstance(kind, type) and issubclass(kind, ShardWorker)):
            raise ValueError(f"{self.worker!r} is no shard worker of this package")
        settings = kind.settings_type.model_validate_json(self.settings)
        worker: ShardWorker[Any, Any] = kind(settings, device, note)
        return worker

    def _owner_of(self, number: int) -> str:
        return f"{self.owner} {self.files[number].name}"


def make_job(
    worker: type[ShardWorker[Settings, Any]],
    settings: Settings,
    files: Sequence[ShardFile],
    *,
    folder: Path,
    owner: str,
    reads: Sequence[Path] = (),
) -> Job:
    """Say what the work is; paths are made absolute, for other processes stand elsewhere."""
    return Job(
        worker=f"{worker.__module__}:{worker.__qualname__}",
        settings=settings.model_dump_json(),
        files=tuple(files),
        folder=folder.absolute(),
        owner=owner,
        reads=tuple(path.absolute() for path in reads),
    )


class Bench:
    """One worker at work: while it computes a shard, the one before is written.

    At most two shards are in memory. A shard that could not be written raises at the next call.
    """

    def __init__(self, job: Job, device: torch.device, note: Note) -> None:
        self.job, self.worker = job, job.open_worker(device, note)
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
