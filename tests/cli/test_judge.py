"""Judging end to end on the debug run: export, fill in, score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from rldecoder import open_run
from rldecoder.cli.judge import export_pairs, score_files
from rldecoder.errors import BadInputError
from rldecoder.schemas import read_json
from tests.conftest import ROOT
from tests.forked import Done, ForkServer

CONFIG = ROOT / "configs" / "debug.yaml"


@pytest.mark.slow
def test_export_fill_in_and_score(forks: ForkServer, debug_store: Path, tmp_path: Path) -> None:
    def command(*arguments: object) -> Done:
        return forks.run("judge", *map(str, arguments))

    out = tmp_path / "judging"
    result = command("export", CONFIG, out, "--store", debug_store, "--pairs", 9)
    assert result.returncode == 0, result.stderr
    assert "9 pairs" in result.stdout
    rows = [json.loads(line) for line in (out / "judge.jsonl").read_text("ascii").splitlines()]
    key = read_json(out / "key.json")
    assert len(rows) == len(key["items"]) == 9
    for row in rows:
        by_method = {
            key["items"][row["id"]]["first"]: row["explanation_1"],
        }
        if "method_a" in by_method:
            assert by_method["method_a"].startswith(("Active at", "No feature is active"))
        else:
            assert by_method["method_b"].startswith("The model expects")
    with pytest.raises(BadInputError, match="not an empty folder"):
        export_pairs(open_run(CONFIG, debug_store), out, Console(), count=9, seed=0)

    judges = []
    for name, answers in (("ann", ("1", "2", "tie")), ("ben", ("1", "1", "2"))):
        judges.append(tmp_path / f"{name}.jsonl")
        filled = [row | {"answer": answers[i % 3]} for i, row in enumerate(rows)]
        judges[-1].write_text("\n".join(map(json.dumps, filled)), encoding="utf-8")
    scores = tmp_path / "scores.json"
    result = command("score", out / "key.json", *judges, "--result", scores)
    assert result.returncode == 0, result.stderr
    found = read_json(scores)
    assert found["judges"] == ["ann", "ben"]
    assert sum(found["answers"].values()) == 18
    assert found["explainer"] == key["artifact"]
    wins = [
        {"1": float(first == "method_b"), "2": float(first == "method_a"), "tie": 0.5}[a]
        for answers in (("1", "2", "tie"), ("1", "1", "2"))
        for a, first in zip(
            answers * 3, (key["items"][row["id"]]["first"] for row in rows), strict=True
        )
    ]
    assert found["win_rate"]["mean"] == pytest.approx(sum(wins) / 18)
    assert "Krippendorff" in result.stdout

    judges[0].write_text(judges[0].read_text().replace("Active", "Passive"), encoding="utf-8")
    with pytest.raises(BadInputError, match="was edited"):
        score_files(out / "key.json", judges, scores, Console())
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "ben.jsonl"
    twin.write_text(judges[1].read_text(), encoding="utf-8")
    with pytest.raises(BadInputError, match="same name"):
        score_files(out / "key.json", [judges[1], twin], scores, Console())
    with pytest.raises(BadInputError, match="cannot be written"):
        score_files(out / "key.json", judges[1:], tmp_path, Console())
