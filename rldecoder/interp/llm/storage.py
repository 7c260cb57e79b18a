"""What outlives a killed run: answers by content, and a ledger of every attempt (both SQLite).

Values are JSON text and numbers. The cache holds no prompt and no key, only hashes of requests
and the models' answers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from sqlalchemy import (
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DatabaseError

from rldecoder.errors import DamagedFileError
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
    """Answers by the hash of all that decides them; shared by runs, safe for several processes."""

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
        with self._engine.connect() as connection:
            text = connection.scalar(select(self._table.c.reply).where(self._table.c.key == key))
        try:
            return None if text is None else Reply(**parse_json(text))
        except (ValueError, TypeError):
            raise DamagedFileError(
                f"{self._path} holds an answer that cannot be read.",
                "Another program wrote to it, or it is damaged.",
                "Delete the file: it only saves asking the same things again.",
            ) from None

    def put(self, key: str, reply: Reply) -> None:
        """Keep an answer; one that is there already stays."""
        row = sqlite_insert(self._table).values(key=key, reply=json.dumps(reply._asdict()))
        with self._engine.begin() as connection:
            connection.execute(row.on_conflict_do_nothing())

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()


class Ledger:
    """All attempts of one artifact, those of earlier, killed runs included."""

    def __init__(self, path: Path) -> None:
        columns = [Column(f.name, _TYPES.get(f.type, Integer), nullable=False) for f in LEDGER]
        self._table = Table("ledger", MetaData(), Column("id", Integer, primary_key=True), *columns)
        self._engine = _open(path, self._table.metadata)

    def add(self, **values: Any) -> int:
        """Write a row, and return its id; `time` is now."""
        with self._engine.begin() as connection:
            row = insert(self._table).values(time=time.time(), **values)
            key = connection.execute(row).inserted_primary_key
        assert key is not None
        return int(key[0])

    def change(self, row: int, **values: Any) -> None:
        """Correct a row."""
        with self._engine.begin() as connection:
            connection.execute(update(self._table).where(self._table.c.id == row).values(**values))

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


def _open(path: Path, metadata: MetaData) -> Engine:
    """A database file with its tables.

    Raises:
        DamagedFileError: the file is something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
    try:
        metadata.create_all(engine)
    except DatabaseError as error:
        raise DamagedFileError(
            f"{path} cannot be opened as a database.",
            str(error.orig),
            "Delete the file: it only saves asking the same things again.",
        ) from error
    return engine
