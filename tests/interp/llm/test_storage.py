"""Answers and ledger in one file: what was damaged is not believed, what is old still opens."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rldecoder.config.llm import Budget
from rldecoder.errors import BadInputError, BudgetExceededError, DamagedFileError
from rldecoder.interp.llm.backends import Reply
from rldecoder.interp.llm.storage import LEDGER, MARKER, Database, Ledger, Spent

ROOT = Path(__file__).resolve().parents[3]
ROW = {
    "purpose": "label", "latent": 3, "model": "m", "prompts": "p", "request": "r", "attempt": 1,
    "outcome": "answered", "cached": 0, "tokens_in": 10, "tokens_out": 5, "cost": 0.25,
    "latency_seconds": 0.1,
}  # fmt: skip


def reply(text: str) -> Reply:
    fields = dict.fromkeys(Reply._fields)
    return Reply(**{**fields, "text": text, "finish": "stop"})  # type: ignore[arg-type]


def run(path: Path, command: str, *values: object) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as connection:
        return connection.execute(command, values).fetchall()


def open_ledger(folder: Path, budget: Budget | None = None, run: str = "progress") -> Ledger:
    return Ledger(Database(folder / "answers.sqlite"), folder / run, budget or Budget())


def test_a_damaged_answer_is_forgotten_and_can_be_kept_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    cache = Database(path)
    cache.put("key", reply("years"))
    assert cache.get("key") == reply("years")
    [(text,)] = run(path, "SELECT reply FROM answers")
    assert isinstance(text, str)
    for damaged in (text.replace("years", "yeArs"), text[:-3], text.replace("sha256", "sha25v")):
        run(path, "UPDATE answers SET reply = ?", damaged)
        assert cache.get("key") is None
        cache.put("key", reply("years"))
        assert cache.get("key") == reply("years")
    # Another request's answer is none of this one's.
    run(path, "UPDATE answers SET key = ?", "other")
    assert cache.get("other") is None


def test_answers_of_earlier_versions_still_count(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    run(
        path,
        "CREATE TABLE answers (key VARCHAR NOT NULL, reply VARCHAR NOT NULL, PRIMARY KEY (key))",
    )
    old = json.dumps(reply("years")._asdict())  # without a hash
    run(path, "INSERT INTO answers VALUES (?, ?)", "key", old)
    assert Database(path).get("key") == reply("years")


def test_a_ledger_of_an_earlier_version_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"")
    with pytest.raises(BadInputError, match="earlier version"):
        Ledger(Database(tmp_path / "answers.sqlite"), tmp_path, Budget())


def test_runs_share_the_file_and_keep_their_own_rows(tmp_path: Path) -> None:
    first, second = open_ledger(tmp_path, run="a"), open_ledger(tmp_path, run="b")
    for ledger, times in ((first, 3), (second, 1)):
        for _ in range(times):
            ledger.add(ROW)
    assert open_ledger(tmp_path, run="a").spent() == first.spent() == Spent(3, 45, 0.75)
    assert second.spent() == Spent(1, 15, 0.25)
    assert open_ledger(tmp_path, run="c").spent() == Spent(0, 0, 0.0)
    assert not (tmp_path / "c").exists()  # to look leaves no trace
    columns = first.columns()
    assert list(columns) == LEDGER.names
    assert columns["latent"] == [3, 3, 3]


def test_an_attempt_over_the_budget_is_not_written(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, Budget(max_tokens=40))
    most = Spent(1, 15, 0.25)
    ledger.add(ROW, most)
    ledger.add(ROW, most)
    with pytest.raises(BudgetExceededError, match="max_tokens = 40 would be exceeded: 30 used"):
        ledger.add(ROW, most)
    ledger.add(ROW | {"cached": 1, "tokens_in": 0, "tokens_out": 0, "cost": 0})
    assert ledger.spent() == Spent(2, 30, 0.5)


def test_a_changed_row_of_the_ledger_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    ledger = open_ledger(tmp_path)
    first = ledger.add(ROW)
    ledger.add(ROW)
    ledger.change(first, {"tokens_out": 7})
    assert open_ledger(tmp_path).spent().tokens == 32
    for damage, mend in (
        ("UPDATE ledger SET cost = 0 WHERE id = 1", "UPDATE ledger SET cost = 0.25 WHERE id = 1"),
        ("UPDATE ledger SET run = 'x' || run WHERE id = 2",
         "UPDATE ledger SET run = substr(run, 2) WHERE id = 2"),
        ("UPDATE runs SET attempts = 3", "UPDATE runs SET attempts = 2"),
    ):  # fmt: skip
        run(path, damage)
        with pytest.raises(DamagedFileError, match="not as they were written"):
            open_ledger(tmp_path)
        run(path, mend)
        open_ledger(tmp_path)
    run(path, "DELETE FROM ledger WHERE id = 2")
    with pytest.raises(DamagedFileError, match="not as they were written"):
        open_ledger(tmp_path)


@pytest.mark.parametrize("marker", [None, b"", b"0" * 32, b"\xff\x00"], ids=str)
def test_what_was_spent_in_another_file_is_not_forgotten(
    tmp_path: Path, marker: bytes | None
) -> None:
    open_ledger(tmp_path).add(ROW)
    name = tmp_path / "progress" / MARKER
    if marker is None:
        (tmp_path / "answers.sqlite").rename(tmp_path / "elsewhere.sqlite")
    else:
        name.write_bytes(marker)
    with pytest.raises(DamagedFileError, match="does not know the run"):
        open_ledger(tmp_path)
    name.unlink()
    assert open_ledger(tmp_path).spent().requests == 0


def test_damage_inside_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    cache = Database(path)
    cache.put("key", reply("years"))
    cache.close()
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    with pytest.raises(DamagedFileError, match=r"answers\.sqlite"):
        Database(path).get("key")
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(DamagedFileError, match=r"answers\.sqlite"):
        Database(path)


PROCESS = """
import sys
from pathlib import Path
from rldecoder.config.llm import Budget
from rldecoder.errors import BudgetExceededError
from rldecoder.interp.llm.storage import Database, Ledger, Spent
from tests.interp.llm.test_storage import ROW, reply
folder, name = Path(sys.argv[1]), sys.argv[2]
database = Database(folder / "answers.sqlite")
own = Ledger(database, folder / name, Budget())
shared = Ledger(database, folder / "progress", Budget(max_requests=50))
for n in range(40):
    database.put(f"{name}{n}", reply(name))
    database.put(f"both{n}", reply("both"))
    own.change(own.add(ROW), {"tokens_out": 6})
    try:
        shared.add(ROW, Spent(1, 15, 0.25))
    except BudgetExceededError:
        pass
"""


def test_processes_write_at_once_and_the_budget_holds_over_both(tmp_path: Path) -> None:
    shared = open_ledger(tmp_path)
    shared.add(ROW)
    children = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), name], cwd=ROOT)
        for name in "ab"
    ]
    assert [child.wait(60) for child in children] == [0, 0]
    assert shared.spent().requests == 50
    for name in "ab":
        assert open_ledger(tmp_path, run=name).spent() == Spent(40, 640, 10.0)
    database = Database(tmp_path / "answers.sqlite")
    for n in range(40):
        assert database.get(f"both{n}") == reply("both")
        assert database.get(f"a{n}") == reply("a")
