"""What outlives a killed run: answers by content, and a ledger of every attempt (both SQLite).

Values are JSON text and numbers. The cache holds no prompt and no key, only hashes of requests
and the models' answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DatabaseError

from rldecoder import files
from rldecoder.config.base import hash_json
from rldecoder.errors import DamagedFileError, StoreBusyError
from rldecoder.interp.llm.backends import Reply
from rldecoder.json_text import parse_json

LEDGER = pa.schema(
    [
        ("time", pa.float64()),
        ("purpose", pa.string()),
        ("latent", pa.int32()),
        ("model", pa.string()),
        ("prompts", pa.string()),
        ("request", pa.string()),
        ("attempt", pa.int32()),
        ("outcome", pa.string()),
        ("cached", pa.int32()),
        ("tokens_in", pa.int64()),
        ("tokens_out", pa.int64()),
        ("cost", pa.float64()),
        ("latency_seconds", pa.float64()),
    ]
)
"""One row an attempt, or an answer taken from the cache (`cached` 1: no tokens, no cost).

`time` is Unix seconds; `request` and `prompts` are hashes of the request and of the prompt files;
`cost` is US dollars by the configured prices. `outcome`: answered, malformed (came, but not in the
form asked for), truncated, refused, timeout, rate_limited, server_error, connection_error,
rejected, stopped (wrong key or address), sent (the run was killed before an answer). Tokens and
cost of attempts that may have been billed without an answer are the most they can be.
Planted features of the judge's gate have negative latents.
"""

_TYPES = {pa.string(): String, pa.float64(): Float}


class Spent(NamedTuple):
    """Totals of a ledger; cached answers cost nothing."""

    requests: int
    tokens: int
    cost: float


class AnswerCache:
    """Answers by the hash of all that decides them; shared by runs, safe for several processes.

    Each has a hash of its own beside it; one that was damaged is forgotten, and asked again.
    """

    def __init__(self, path: Path) -> None:
        self._table = Table(
            "answers",
            MetaData(),
            Column("key", String, primary_key=True),
            Column("reply", String, nullable=False),
        )
        self._path = path
        self._engine = _open(path, self._table.metadata)

    def get(self, key: str) -> Reply | None:
        """The answer, if it is known."""
        with _transaction(self._engine) as connection:
            text = connection.scalar(select(self._table.c.reply).where(self._table.c.key == key))
        if text is None:
            return None
        try:
            return _parse_reply(key, text)
        except (ValueError, TypeError):
            with _transaction(self._engine) as connection:
                connection.execute(delete(self._table).where(self._table.c.key == key))
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep an answer; one that is there already stays."""
        fields = reply._asdict()
        text = json.dumps({**fields, _CHECK: _check(key, fields)})
        row = sqlite_insert(self._table).values(key=key, reply=text)
        with _transaction(self._engine) as connection:
            connection.execute(row.on_conflict_do_nothing())

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()


class Ledger:
    """All attempts of one artifact, those of earlier, killed runs included.

    Each row has a hash, in a table of its own, so that ledgers of before hashes still open.

    Raises:
        DamagedFileError: the file is no ledger, or a row was changed by something else.
    """

    def __init__(self, path: Path) -> None:
        metadata = MetaData()
        columns = [Column(f.name, _TYPES.get(f.type, Integer), nullable=False) for f in LEDGER]
        self._table = Table("ledger", metadata, Column("id", Integer, primary_key=True), *columns)
        self._checks = Table(
            "checks",
            metadata,
            Column("id", Integer, primary_key=True),
            Column("sha256", String, nullable=False),
        )
        self._engine = _open(path, metadata)
        self._verify(path)

    def add(self, **values: Any) -> int:
        """Write a row, and return its id; `time` is now."""
        with _transaction(self._engine) as connection:
            row = insert(self._table).values(time=time.time(), **values)
            key = connection.execute(row).inserted_primary_key
            assert key is not None
            self._seal(connection, int(key[0]))
        return int(key[0])

    def change(self, row: int, **values: Any) -> None:
        """Correct a row."""
        with _transaction(self._engine) as connection:
            connection.execute(update(self._table).where(self._table.c.id == row).values(**values))
            self._seal(connection, row)

    def _seal(self, connection: Connection, row: int) -> None:
        found = connection.execute(select(self._table).where(self._table.c.id == row)).one()
        check = sqlite_insert(self._checks).values(id=row, sha256=hash_json(list(found)))
        new = {"sha256": check.excluded.sha256}
        connection.execute(check.on_conflict_do_update(index_elements=["id"], set_=new))

    def _verify(self, path: Path) -> None:
        with _transaction(self._engine) as connection:
            rows = {row.id: hash_json(list(row)) for row in connection.execute(select(self._table))}
            checks = dict(connection.execute(select(self._checks)).tuples().all())
        # A ledger of before hashes has rows without, but none that are checked before them.
        first = min(checks, default=None)
        changed = [
            number
            for number in {*rows, *checks}
            if first is not None and number >= first and rows.get(number) != checks.get(number)
        ]
        if changed:
            raise _damaged(path, f"{len(changed)} of its rows are not as they were written.")

    def spent(self) -> Spent:
        """Totals of all rows that are not from the cache."""
        t = self._table.c
        query = select(
            func.count(),
            func.coalesce(func.sum(t.tokens_in + t.tokens_out), 0),
            func.coalesce(func.sum(t.cost), 0.0),
        ).where(t.cached == 0)
        with self._engine.connect() as connection:
            requests, tokens, cost = connection.execute(query).one()
        return Spent(int(requests), int(tokens), float(cost))

    def columns(self) -> dict[str, list[Any]]:
        """All rows as columns of LEDGER, oldest first."""
        t = self._table.c
        query = select(*(t[name] for name in LEDGER.names)).order_by(t.id)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return {name: [row[i] for row in rows] for i, name in enumerate(LEDGER.names)}

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()


_CHECK = "sha256"


def _check(key: str, fields: dict[str, Any]) -> str:
    return hash_json({"key": key, **fields})


def _parse_reply(key: str, text: str) -> Reply:
    """A kept answer; those of before hashes have none.

    Raises:
        ValueError, TypeError: it was damaged.
    """
    fields = parse_json(text)
    check = fields.pop(_CHECK, None)
    if check is not None and check != _check(key, fields):
        raise ValueError("another SHA-256")
    return Reply(**fields)


def _open(path: Path, metadata: MetaData) -> Engine:
    """A database file with its tables.

    Raises:
        DamagedFileError: the file is something else.
        NoResourceError: the disk is full or read-only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
    with files.explained(path.parent, f"opening {path.name}"):
        try:
            metadata.create_all(engine)
        except DatabaseError as error:
            raise _damaged(path, str(error.orig)) from error
    return engine


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    """A transaction; damage that SQLite finds is an error that names the file.

    Raises:
        DamagedFileError, NoResourceError: as `_open`. StoreBusyError: somebody writes for long.
    """
    path = Path(str(engine.url.database))
    with files.explained(path.parent, f"using {path.name}"):
        try:
            with engine.begin() as connection:
                yield connection
        except DatabaseError as error:
            if "locked" in str(error.orig):
                raise StoreBusyError(f"{path} is in use by another process.") from error
            raise _damaged(path, str(error.orig)) from error


def _damaged(path: Path, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"{path} cannot be used as a database.",
        why,
        "Delete the file: it only saves asking the same things again, and counts what was spent.",
    )
