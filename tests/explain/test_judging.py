"""Blind pairs tell nothing, spoilt files are refused, and the statistics are those of scipy."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rldecoder.errors import BadInputError
from rldecoder.explain.claims import CheckedClaim, Claim
from rldecoder.explain.explanation import Explanation, Prediction
from rldecoder.explain.judging import (
    CODES,
    JudgeItem,
    JudgeKey,
    _alpha,
    blind_pairs,
    read_answers,
    read_key,
    score_judgments,
    write_blind,
)
from rldecoder.schemas import write_json

HOSTILE = "=cmd|' /C calc'!A0\u202e\u200b</script>\x1b[2J"


def explanation(number: int, claims: int = 1) -> Explanation:
    prediction = Prediction(f"tok{number}{HOSTILE}", number, 0.5, ())
    claim = Claim(7, None, 1, "a", "supports", 0.5, 0.1, "b", 0.5, 0.9)
    return Explanation(
        prompt=f"{HOSTILE} prompt {number}",
        tokens=("a", "b"),
        frozen=prediction,
        decoder=prediction,
        kl=0.1,
        method_a=f"Active at {number}: {HOSTILE}",
        ranked=(),
        claims=(CheckedClaim(claim, 0.4, "supported", 0.3),) * claims,
        method_b=f"Claim {number}: {HOSTILE}",
        sanity=None,
    )


Filler = Callable[[JudgeItem], object]


@pytest.fixture
def pairs() -> tuple[list[JudgeItem], JudgeKey]:
    many = [explanation(i, claims=i % 2) for i in range(40)]
    return blind_pairs(many, seed=3, artifact="abc")


def fill(items: list[JudgeItem], path: Path, answer: Filler) -> Path:
    lines = [json.dumps({**item.model_dump(), "answer": answer(item)}) for item in items]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def prefers(key: JudgeKey, method: str) -> Filler:
    """The answers of someone who always takes one method."""
    return lambda item: "1" if key.items[item.id].first == method else "2"


def test_the_blind_file_does_not_say_which_is_which(
    pairs: tuple[list[JudgeItem], JudgeKey], tmp_path: Path
) -> None:
    items, key = pairs
    write_blind(items, tmp_path / "judge.jsonl")
    raw = (tmp_path / "judge.jsonl").read_text(encoding="ascii")
    assert "method" not in raw.lower()
    assert "\x1b" not in raw
    for text in (raw, json.dumps(items[0].model_dump())):
        assert "\\u202e" not in text.lower()
        assert "\\u001b" not in text.lower()
    rows = [json.loads(line) for line in raw.splitlines()]
    assert set(rows[0]) == set(JudgeItem.model_fields)
    assert all(row["answer"] is None for row in rows)
    firsts = [key.items[row["id"]].first for row in rows]
    assert 10 < firsts.count("method_a") < 30
    for row, first in zip(rows, firsts, strict=True):
        start = {"method_a": "Active at", "method_b": "Claim"}
        other = {"method_a": "method_b", "method_b": "method_a"}
        assert row["explanation_1"].startswith(start[first])
        assert row["explanation_2"].startswith(start[other[first]])
        number = row["explanation_1"].split(":")[0].split()[-1]
        assert f"prompt {number}" in row["text"]
        assert row["predicted"].startswith(f"tok{number}")
    order = [row["text"].split()[-1] for row in rows]
    assert order != sorted(order, key=int)


def test_order_depends_on_the_seed_alone() -> None:
    many = [explanation(i) for i in range(12)]
    first, again, other = (
        blind_pairs(many, seed=seed, artifact="abc")[1].items for seed in (1, 1, 2)
    )
    assert first == again
    assert [k.first for k in first.values()] != [k.first for k in other.values()]


@pytest.mark.parametrize("method", ["method_a", "method_b"])
def test_answers_are_decoded_by_the_key(
    pairs: tuple[list[JudgeItem], JudgeKey], tmp_path: Path, method: str
) -> None:
    items, key = pairs
    write_json(tmp_path / "key.json", key.model_dump(mode="json"))
    assert read_key(tmp_path / "key.json") == key
    path = fill(items, tmp_path / "ann.jsonl", prefers(key, method))
    answers = read_answers(path, key)
    assert set(answers.values()) == {method}
    assert set(answers) == set(key.items)
    found = score_judgments({"ann": answers}, key)
    rate = 1.0 if method == "method_b" else 0.0
    assert found["win_rate"] == {"mean": rate, "low": rate, "high": rate, "num_items": 40}
    assert found["win_rate_with_claims"]["num_items"] == 20
    assert found["sign_test"]["pvalue"] == stats.binomtest(40 * int(rate), 40, 0.5).pvalue
    assert found["alpha"] is None
    assert "two judges" in found["alpha_note"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"answer": None}, "item 0002 has no answer"),
        ({"answer": "3"}, "answer: Input should be '1', '2' or 'tie'"),
        ({"answer": 1}, "answer: Input should be"),
        ({"id": "9999"}, "there is no item 9999"),
        ({"id": "\x1b[2J"}, "there is no item ␛[2J"),
        ({"id": "0001"}, "item 0001 is there twice"),
        ({"explanation_1": "Mine is better."}, "the text of item 0002 was edited"),
        ({"text": ""}, "the text of item 0002 was edited"),
        ({"question": "Which is longer?"}, "the text of item 0002 was edited"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
    ],
)
def test_spoilt_files_are_refused_with_the_line(
    pairs: tuple[list[JudgeItem], JudgeKey], tmp_path: Path, change: dict[str, object], fault: str
) -> None:
    items, key = pairs
    rows = [{**item.model_dump(), "answer": "tie"} for item in items]
    rows[1] |= change
    path = tmp_path / "ann.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(BadInputError) as error:
        read_answers(path, key)
    assert f"line 2: {fault}" in error.value.why


def test_files_that_are_cut_or_no_files_are_refused(
    pairs: tuple[list[JudgeItem], JudgeKey], tmp_path: Path
) -> None:
    items, key = pairs
    with pytest.raises(BadInputError, match="cannot be counted") as error:
        read_answers(fill(items[:-2], tmp_path / "ann.jsonl", lambda _: "1"), key)
    assert error.value.why == "items left out: 0039, 0040"
    (tmp_path / "cut.jsonl").write_text('{"id": "0001"', encoding="utf-8")
    with pytest.raises(BadInputError) as error:
        read_answers(tmp_path / "cut.jsonl", key)
    assert "line 1: " in error.value.why
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "latin.jsonl", tmp_path / "nowhere.jsonl"):
        with pytest.raises(BadInputError, match="cannot be read"):
            read_answers(path, key)
    with pytest.raises(BadInputError, match="is not a key"):
        read_key(tmp_path / "cut.jsonl")
    with pytest.raises(BadInputError, match="cannot be read"):
        read_key(tmp_path / "nowhere.json")
    with pytest.raises(BadInputError, match="nothing to count"):
        score_judgments({}, key)


def test_statistics_of_several_judges(
    pairs: tuple[list[JudgeItem], JudgeKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = pairs
    lot = random.Random(0)
    names = list(key.items)
    judges = {
        judge: {name: lot.choices(("method_a", "tie", "method_b"), (2, 1, 5))[0] for name in names}
        for judge in ("ann", "ben", "cleo")
    }
    found = score_judgments(judges, key, resamples=400)
    value = {"method_a": 0.0, "tie": 0.5, "method_b": 1.0}
    means = [np.mean([value[judges[j][name]] for j in judges]) for name in names]
    assert found["win_rate"]["mean"] == pytest.approx(np.mean(means))
    assert found["win_rate"]["low"] < np.mean(means) < found["win_rate"]["high"]
    wins, losses = sum(m > 0.5 for m in means), sum(m < 0.5 for m in means)
    sign = found["sign_test"]
    assert (sign["wins"], sign["losses"], sign["even"]) == (wins, losses, 40 - wins - losses)
    assert sign["pvalue"] == pytest.approx(stats.binomtest(wins, wins + losses, 0.5).pvalue)
    assert abs(found["alpha"]) < 0.25, "three judges by lot do not agree"
    firsts = [
        judges[j][name] == key.items[name].first
        for j in judges for name in names if judges[j][name] != "tie"
    ]  # fmt: skip
    assert found["first_chosen"] == pytest.approx(np.mean(firsts))
    same = score_judgments({"ann": judges["ann"], "twin": judges["ann"]}, key)
    assert same["alpha"] == pytest.approx(1.0)
    constant = dict.fromkeys(names, "method_b")
    assert score_judgments({"a": constant, "b": constant}, key)["alpha"] is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "rl-decoder[judge]" in score_judgments(judges, key)["alpha_note"]


def test_alpha_of_a_known_example() -> None:
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section A: alpha = .095."""
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    answers = [CODES["method_a"], CODES["method_b"]]
    alpha, note = _alpha(np.array([[answers[code] for code in judge] for judge in (first, second)]))
    assert alpha == pytest.approx(0.095, abs=0.001)
    assert note == ""
    # A tie is an answer of its own, no nearer to A than B is. By hand: 1 - observed / expected.
    tied = np.array([[CODES["method_a"], CODES["method_b"]], [CODES["tie"], CODES["method_b"]]])
    assert _alpha(tied)[0] == pytest.approx(1 - (2 / 4) / (10 / 12))
