"""What outlives a killed run: one SQLite file with answers by content and every run's attempts.

Runs share the file, several at once too. It holds no prompt and no key, only hashes of requests
and the models' answers. Answers that earlier versions kept in it count on.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from rldecoder import files
from rldecoder.config.base import hash_json
from rldecoder.config.llm import Budget
from rldecoder.errors import BadInputError, BudgetExceededError, DamagedFileError, StoreBusyError
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

MARKER = "llm_run"
"""In a stage's progress folder: which run of the ledger is its own."""
WAIT_SECONDS = 30.0
"""How long another process's write is waited for."""
_CASTS: Mapping[pa.DataType, type] = {pa.string(): str, pa.float64(): float}
_COLUMNS = ", ".join(LEDGER.names)
_TABLES = f"""
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY NOT NULL, reply TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (id TEXT PRIMARY KEY NOT NULL, attempts INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS ledger
    (id INTEGER PRIMARY KEY, run TEXT NOT NULL, {_COLUMNS}, sha256 TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS ledger_by_run ON ledger (run);
"""
_CHECK = "sha256"


class Spent(NamedTuple):
    """Totals of a ledger; cached answers cost nothing."""

    requests: int
    tokens: int
    cost: float


class Database:
    """The file. Its answers are those of all runs, by the hash of all that decides them.

    Each has a hash of its own beside it; one that was damaged is forgotten, and asked again.

    Raises:
        DamagedFileError: the file is something else. NoResourceError: the disk is full or
            read-only. StoreBusyError: somebody writes for long. Its methods raise the same.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        deadline = time.monotonic() + WAIT_SECONDS
        with files.explained(path.parent, f"opening {path.name}"), self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
            while True:
                try:
                    # Readers and one writer at once; what was committed survives kill -9.
                    self._connection.execute("PRAGMA journal_mode = WAL")
                    self._connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
                    break
                except sqlite3.OperationalError as error:
                    # Where several make the file at once, SQLite does not wait by itself.
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, one at a time over all threads and processes."""
        place, what = self.path.parent, f"using {self.path.name}"
        with files.explained(place, what), self._explained(), self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise StoreBusyError(f"{self.path} is in use by another process.") from error
            raise self.damaged(str(error)) from error

    def damaged(self, why: str) -> DamagedFileError:
        """The error for content that is not what was written."""
        return DamagedFileError(
            f"{self.path} cannot be used as a database.",
            why,
            "Delete the file: it only saves asking the same things again, and counts what "
            f"interrupted runs spent (their progress folders' `{MARKER}` goes with it).",
        )

    def get(self, key: str) -> Reply | None:
        """The answer, if it is known."""
        with self.transaction() as connection:
            row = connection.execute("SELECT reply FROM answers WHERE key = ?", [key]).fetchone()
            if row is None:
                return None
            try:
                return _parse_reply(key, row[0])
            except (ValueError, TypeError):
                connection.execute("DELETE FROM answers WHERE key = ?", [key])
                return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep an answer; one that is there already stays."""
        fields = reply._asdict()
        text = json.dumps({**fields, _CHECK: hash_json({"key": key, **fields})})
        with self.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", [key, text])

    def close(self) -> None:
        """Let go of the file; a thread that nobody waits for gets an error from now on."""
        with self._lock:
            self._connection.close()


class Ledger:
    """All attempts of one artifact within its budget, those of earlier, killed runs included.

    Args:
        progress: the artifact's folder that outlives a kill; says which attempts are its own.

    Raises:
        DamagedFileError: a row was changed by something else, or the attempts are in another
            file. BadInputError: an earlier version counted them.
    """

    def __init__(self, database: Database, progress: Path, budget: Budget) -> None:
        self._database, self._marker, self._budget = database, progress / MARKER, budget
        self._beginning = threading.Lock()
        old = progress / "ledger.sqlite"
        if old.exists():
            raise BadInputError(
                f"{old} is the ledger of a run that an earlier version began.",
                "What that run spent would not be counted in this one's budget.",
                "Delete the file to go on with all answers that came, and lower "
                "`label_features.llm.budget` by what was spent.",
            )
        self._run: str | None = None
        if self._marker.exists():
            self._run = self._marker.read_text("utf-8", errors="replace")
            self._verify()

    def _verify(self) -> None:
        with self._database.transaction() as connection:
            known = connection.execute("SELECT attempts FROM runs WHERE id = ?", [self._run])
            count = known.fetchone()
            # A row whose run nobody knows may be one of ours, damaged.
            query = f"SELECT sha256, run, {_COLUMNS} FROM ledger WHERE run = ?"
            query += " OR run NOT IN (SELECT id FROM runs)"
            rows = connection.execute(query, [self._run]).fetchall()
        if count is None:
            raise DamagedFileError(
                f"{self._database.path} does not know the run that {self._marker} names.",
                "What it spent was counted in another file (`label_features.llm.cache`), or that "
                "file was deleted.",
                f"Set `cache` to that file, or delete {self._marker}: then nothing is counted.",
            )
        wrong = sum(check != hash_json(values) for check, *values in rows)
        if wrong or len(rows) != count[0]:
            raise self._database.damaged("Rows of the ledger are not as they were written.")

    def add(self, values: Mapping[str, Any], most: Spent | None = None) -> int:
        """Write a row, and return its id.

        Args:
            most: of an attempt that is about to be sent: the most it can use. It is counted before
                it is sent, so that a killed run cannot forget it.

        Raises:
            BudgetExceededError: it might go over.
        """
        self._begin()
        row = [self._run, *_cast({"time": time.time(), **values})]
        marks = ", ".join("?" * (len(row) + 1))
        with self._database.transaction() as connection:
            if most is not None:
                self._refuse(_spent(connection, self._run), most)
            added = connection.execute(
                f"INSERT INTO ledger (run, {_COLUMNS}, sha256) VALUES ({marks})",
                [*row, hash_json(row)],
            )
            connection.execute("UPDATE runs SET attempts = attempts + 1 WHERE id = ?", [self._run])
        assert added.lastrowid is not None
        return added.lastrowid

    def _begin(self) -> None:
        """Give this artifact its place in the file, known there before the folder names it."""
        with self._beginning:
            if self._run is None:
                run = uuid.uuid4().hex
                with self._database.transaction() as connection:
                    connection.execute("INSERT INTO runs VALUES (?, 0)", [run])
                files.write_bytes(self._marker, run.encode())
                self._run = run

    def _refuse(self, spent: Spent, most: Spent) -> None:
        for name, used, more in zip(Spent._fields, spent, most, strict=True):
            limit = getattr(self._budget, f"max_{name}")
            if limit is not None and used + more > limit:
                raise BudgetExceededError(
                    f"The budget max_{name} = {limit:,.8g} would be exceeded: {used:,.8g} used, "
                    f"and the next request may use {more:,.8g}.",
                    "It was not sent. Answers that came are kept.",
                    f"Raise `label_features.llm.budget.max_{name}` and run again: it goes on "
                    "from here. `rldecoder estimate-labels` says what is still needed.",
                )

    def change(self, row: int, values: Mapping[str, Any]) -> None:
        """Correct a row."""
        with self._database.transaction() as connection:
            query = f"SELECT run, {_COLUMNS} FROM ledger WHERE id = ?"
            run, *found = connection.execute(query, [row]).fetchone()
            new = [run, *_cast(dict(zip(LEDGER.names, found, strict=True)) | dict(values))]
            sets = ", ".join(f"{name} = ?" for name in ("run", *LEDGER.names, _CHECK))
            connection.execute(
                f"UPDATE ledger SET {sets} WHERE id = ?", [*new, hash_json(new), row]
            )

    def spent(self) -> Spent:
        """Totals of all rows that are not from the cache."""
        with self._database.transaction() as connection:
            return _spent(connection, self._run)

    def columns(self) -> dict[str, list[Any]]:
        """All rows as columns of LEDGER, oldest first."""
        query = f"SELECT {_COLUMNS} FROM ledger WHERE run = ? ORDER BY id"
        with self._database.transaction() as connection:
            rows = connection.execute(query, [self._run]).fetchall()
        return {name: [row[i] for row in rows] for i, name in enumerate(LEDGER.names)}


def _spent(connection: sqlite3.Connection, run: str | None) -> Spent:
    query = """SELECT COUNT(*), COALESCE(SUM(tokens_in + tokens_out), 0), COALESCE(SUM(cost), 0.0)
        FROM ledger WHERE run = ? AND cached = 0"""
    return Spent(*connection.execute(query, [run]).fetchone())


def _cast(values: Mapping[str, Any]) -> list[Any]:
    """A row in the columns' order and types, so that it reads as it was hashed."""
    return [_CASTS.get(field.type, int)(values[field.name]) for field in LEDGER]


def _parse_reply(key: str, text: str) -> Reply:
    """A kept answer; those of before hashes have none.

    Raises:
        ValueError, TypeError: it was damaged.
    """
    fields = parse_json(text)
    check = fields.pop(_CHECK, None)
    if check is not None and check != hash_json({"key": key, **fields}):
        raise ValueError("another SHA-256")
    return Reply(**fields)
