"""Answers and ledger: what was damaged is not believed, what is old still opens."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from rldecoder.errors import DamagedFileError
from rldecoder.interp.llm.backends import Reply
from rldecoder.interp.llm.storage import AnswerCache, Ledger

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


def test_a_damaged_answer_is_forgotten_and_can_be_kept_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    cache = AnswerCache(path)
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


def test_answers_of_before_hashes_still_count(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "answers.sqlite")
    old = json.dumps(reply("years")._asdict())
    run(tmp_path / "answers.sqlite", "INSERT INTO answers VALUES (?, ?)", "key", old)
    assert cache.get("key") == reply("years")


def test_a_changed_row_of_the_ledger_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    first = ledger.add(**ROW)
    ledger.add(**ROW)
    ledger.change(first, tokens_out=7)
    assert Ledger(path).spent().tokens == 32
    for damage, mend in (
        ("UPDATE ledger SET cost = 0 WHERE id = 1", "UPDATE ledger SET cost = 0.25 WHERE id = 1"),
        ("UPDATE checks SET id = 9 WHERE id = 2", "UPDATE checks SET id = 2 WHERE id = 9"),
    ):
        run(path, damage)
        with pytest.raises(DamagedFileError, match="not as they were written"):
            Ledger(path)
        run(path, mend)
        Ledger(path)


def test_a_ledger_of_before_hashes_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).add(**ROW)
    run(path, "DROP TABLE checks")
    Ledger(path).add(**ROW)
    assert Ledger(path).spent().requests == 2


def test_damage_inside_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    cache = AnswerCache(path)
    cache.put("key", reply("years"))
    cache.close()
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    with pytest.raises(DamagedFileError, match=r"answers\.sqlite"):
        AnswerCache(path).get("key")
