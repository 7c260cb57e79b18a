"""A shard worker of tests: the shard of number n holds n times its setting."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from rldecoder import files
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.executors import jobs
from rldecoder.executors.jobs import (
    Advance,
    Job,
    Measured,
    ShardFile,
    ShardSettings,
    ShardWorker,
    make_job,
)


class Factor(ShardSettings):
    """How many numbers, what each is multiplied by; and which shards fail, and how."""

    count: int = 6
    factor: int = 3
    bad_input: tuple[int, ...] = ()
    no_memory: tuple[int, ...] = ()
    fault: tuple[int, ...] = ()
    unwritable: tuple[int, ...] = ()

    def shards(self) -> list[ShardFile]:
        """One a number."""
        return [ShardFile(f"number-{n}", 1.0) for n in range(self.count)]


class Multiplier(ShardWorker[Factor, bytes]):
    """See `Factor`."""

    settings_type = Factor
    done = 0

    def facts(self) -> Mapping[str, int]:
        """What a stage may ask."""
        return {"factor": self.settings.factor}

    def measured(self) -> Measured:
        """Shards that this worker computed."""
        return {"shards": self.done}

    def compute(self, number: int, advance: Advance) -> bytes:
        """Its product."""
        if number in self.settings.bad_input:
            raise BadInputError("Shard of bad input.", "why", "mend")
        if number in self.settings.no_memory:
            raise NoResourceError("No memory for a shard.", "why", "mend")
        if number in self.settings.fault:
            raise KeyError(number)
        advance(1)
        self.done += 1
        return str(number * self.settings.factor).encode()

    def write(self, path: Path, result: bytes) -> str:
        """As text."""
        if int(result) in [n * self.settings.factor for n in self.settings.unwritable]:
            raise OSError(28, "No space left on device", str(path))
        files.write_bytes(path, result)
        return hashlib.sha256(result).hexdigest()


def counting_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, count: int = 6, **settings: object
) -> Job:
    """Some shards in a folder, which is made."""
    monkeypatch.setattr(jobs, "OURS", ("rldecoder.", "tests."))
    folder.mkdir(exist_ok=True)
    factor = Factor.model_validate(settings | {"count": count})
    return make_job(Multiplier, factor, folder=folder, owner="test/0123")


def products(job: Job) -> list[int]:
    """What is in the files."""
    return [int(job.path(n).read_bytes()) for n in range(len(job.files))]
