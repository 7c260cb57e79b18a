"""Published artifacts as their readers see them: typed files, verdict, caveats, metrics.

A class in the catalogue names each file of one stage's artifact once, as a `File`:

    FinalDecoder.freeze.save(folder, record)  # the class has the file: its place, how to save it
    final.freeze.which                        # an artifact has its content, read once

What a file holds is named by its import path, so that looking at an artifact imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar, overload

from rldecoder.json_records import Columns, Row, Scalar

if TYPE_CHECKING:
    import pyarrow as pa

    from rldecoder.artifacts.store import Manifest


class Saved(Protocol):
    """A record that reads and writes its own file (see `rldecoder.schemas.JsonRecord`)."""

    def save(self, path: Path) -> None:
        """Write it."""
        ...

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it back."""
        ...


T = TypeVar("T")
R = TypeVar("R", bound=Saved)


class File(ABC, Generic[T]):
    """A file of an artifact: its name, and how its content is read.

    Args:
        name: relative to the artifact's folder.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._attribute = ""

    def __set_name__(self, owner: type, attribute: str) -> None:
        self._attribute = attribute

    def path(self, folder: Path) -> Path:
        """Where it is in an artifact's folder."""
        return folder / self.name

    @abstractmethod
    def read(self, folder: Path) -> T:
        """Its content."""

    @overload
    def __get__(self, artifact: None, owner: type) -> Self: ...

    @overload
    def __get__(self, artifact: Artifact, owner: type) -> T: ...

    def __get__(self, artifact: Artifact | None, owner: type) -> Self | T:
        if artifact is None:
            return self
        # Kept where Python looks first, as `cached_property` does: a file is read once.
        content = artifact.__dict__[self._attribute] = self.read(artifact.folder)
        return content


class Plain(File[Path]):
    """A file or folder whose readers want its place: weights, figures, pages."""

    def read(self, folder: Path) -> Path:
        """Its path."""
        return self.path(folder)


class Shards(Plain):
    """Parquet files in parts a split, which readers of their own go through."""

    def path(self, folder: Path) -> Path:
        """The folder that holds them."""
        return folder


class Record(File[R]):
    """A JSON or YAML file with a record class of its own.

    Args:
        record: the class, as `module:Name`; imported when the file is first read.
    """

    def __init__(self, name: str, record: str) -> None:
        super().__init__(name)
        self._record = record

    def read(self, folder: Path) -> R:
        """The record; raises DamagedFileError as its `load` does."""
        record: type[R] = _located(self._record)
        return record.load(self.path(folder))

    def save(self, folder: Path, record: R) -> None:
        """Write it into a folder that is to be published."""
        record.save(self.path(folder))


class Table(File["pa.Table"]):
    """A Parquet file with a schema.

    Args:
        schema: where its `pa.Schema` is, as `module:NAME`.
    """

    def __init__(self, name: str, schema: str) -> None:
        super().__init__(name)
        self._schema = schema

    def read(self, folder: Path) -> pa.Table:
        """All columns."""
        from rldecoder import schemas  # here, because looking at an artifact reads no table

        return schemas.read_parquet(self.path(folder), self.schema.names)

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        schema: pa.Schema = _located(self._schema)
        return schema

    def save(self, folder: Path, columns: Columns) -> None:
        """Write columns of equal length into a folder that is to be published."""
        from rldecoder import schemas

        schemas.write_parquet(self.path(folder), columns, self.schema)

    def save_rows(self, folder: Path, rows: Sequence[Row]) -> None:
        """Write rows, each with a value for every column."""
        self.save(folder, {name: [row[name] for row in rows] for name in self.schema.names})


class Maybe(File[T | None]):
    """A file that a run may do without; its content is then None."""

    def __init__(self, file: File[T]) -> None:
        super().__init__(file.name)
        self.file = file

    def read(self, folder: Path) -> T | None:
        """The content, or None where there is no file."""
        return self.file.read(folder) if self.path(folder).exists() else None

    def save_rows(self, folder: Path, rows: Sequence[Row]) -> None:
        """Write a table that was asked for."""
        assert isinstance(self.file, Table)
        self.file.save_rows(folder, rows)


@dataclass(frozen=True)
class Artifact:
    """A published, verified artifact. Its files are read only.

    The classes of the catalogue add the files; `stage` and `kind` are theirs, too.
    """

    stage: ClassVar[str]
    """The stage that publishes it."""
    kind: ClassVar[str]
    """What it is, in the words of its reference."""

    folder: Path
    """Where its files are."""
    digest: str
    """Its address in the store."""
    metrics: Mapping[str, Scalar]
    """Headline numbers."""
    config: Mapping[str, Any]
    """The stage config that built it, as plain values."""
    verdict: str | None = None
    """`pass` or `fail` for gates, None for all else."""
    caveats: tuple[str, ...] = ()
    """What readers of anything built on this must be told (failed gates upstream, ...)."""
    wall_seconds: float = 0.0
    """How long the stage took; of a resumed one, its last part."""

    @classmethod
    def opened(cls, folder: Path, manifest: Manifest) -> Self:
        """The artifact in `folder`, whose manifest has been verified."""
        return cls(
            folder=folder, digest=manifest.digest, metrics=manifest.metrics, config=manifest.config,
            verdict=manifest.verdict, caveats=tuple(manifest.caveats),
            wall_seconds=manifest.wall_seconds,
        )  # fmt: skip

    @classmethod
    def files(cls) -> dict[str, File[Any]]:
        """All files that it may have, by attribute, in the order of the class."""
        return {name: value for name, value in vars(cls).items() if isinstance(value, File)}


def _located(place: str) -> Any:
    """What `module:Name` names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
