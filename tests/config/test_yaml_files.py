"""YAML of people: doubled keys, words that are no booleans, bombs, and files that are no YAML."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml

from rldecoder.config.yaml_files import MAX_DEPTH, YamlFaultError, parse_yaml, read_yaml
from rldecoder.errors import BadInputError
from tests.conftest import ROOT

OWN = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("docs/experiments/*.yaml")])


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_the_projects_own_files_mean_what_they_meant(path: Path) -> None:
    assert read_yaml(path, what="config") == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("yes", "no", "on", "off", "Yes", "y", "n", "OFF", "=")],
        *[(word, word) for word in ("0123", "1:00:00", "2024-01-01", "0.1.2", "1_", "0o9", "--")],
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("-7", -7), ("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("0", 0),
        ("1e-3", 1e-3), ("1.5E+6", 1.5e6), ("-.5", -0.5), ("2.", 2.0), (".inf", float("inf")),
        ("'true'", "true"), ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("a: &x {k: 1}\nb: {<<: *x, m: 2}\nc: {<<: *x, k: 3}",
         {"a": {"k": 1}, "b": {"k": 1, "m": 2}, "c": {"k": 3}}),
    ],
)  # fmt: skip
def test_words_and_numbers_are_read_as_people_mean_them(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "train_sae: {k: 1}\n# pasted\ntrain_sae: {lr: 1}",
        "train_sae: 1\n'other': 2\n\"train_sae\": 3",
        "deep:\n  - train_sae: 1\n    x: 2\n    train_sae: 1",
    ],
)
def test_a_key_twice_is_refused_with_both_lines(text: str) -> None:
    first, second = (n for n, line in enumerate(text.split("\n"), 1) if "train_sae" in line)
    with pytest.raises(YamlFaultError) as caught:
        parse_yaml(text)
    assert f"train_sae is there twice, in line {first} and in line {second}" in str(caught.value)


LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k0: lol, l0: lol}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], k{i}: 1}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (LAUGHS, "aliases unfold"),
        (MERGES, "aliases unfold"),
        ("&a [*a]", "within its own anchor"),
        ("[" * 100_000, "nested deeper"),
        ("{a: " * 50_000, "nested deeper"),
        ("- " * 100_000, "nested deeper"),
        ("? " * 1_000, "nested deeper"),
        ("[" + "1," * 100_000 + "]", "values"),
        ("x" * 300_000, "longer"),
        ("9" * 10_000, "too long"),
    ],
    ids=["laughs", "merges", "itself", "lists", "maps", "dashes", "keys", "many", "long", "digits"],
)
def test_bombs_end_at_once(text: str, what: str) -> None:
    started = time.process_time()
    with pytest.raises(YamlFaultError, match=what):
        parse_yaml(text)
    assert time.process_time() - started < 5  # each is under a second where nothing else runs


def test_a_bomb_takes_no_memory() -> None:
    tracemalloc.start()
    for text in (LAUGHS, MERGES):
        with pytest.raises(YamlFaultError):
            parse_yaml(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_depth_that_settings_have_is_no_fault() -> None:
    assert parse_yaml("[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1))


@pytest.mark.parametrize(
    "text",
    [
        "root:x:hunter2\n\tbad: [hunter2",
        "key: 'hunter2",
        "a: b: hunter2",
        "x: *hunter2",
        "x: !hunter2 y",
        "x: !hun'ter2hunter2 y",
        "x: !!python/object/apply:os.system [hunter2]",
        "a: 1\n---\nhunter2: 2",
        "? [hunter2]\n: 1",
        "x: !!int hunter2",
        "x: !!bool hunter2",
        "x: !!timestamp hunter2",
        "hunter2: \x01",
        "<<: hunter2",
    ],
)
def test_faults_say_where_and_repeat_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError, match="is not valid YAML") as caught:
        read_yaml(path, what="config")
    assert "hunter2" not in str(caught.value)
    assert "line " in caught.value.why
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "latin-1"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    text = ("\ufeff" if encoding == "utf-16-be" else "") + "a: 1\ndescription: fr\xfch\n"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(BadInputError, match="save it as UTF-8"):
        read_yaml(path, what="config")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text("a: 1", encoding="utf-8-sig")
    assert read_yaml(path, what="config") == {"a": 1}
