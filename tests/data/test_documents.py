"""Cleaning and the assignment of documents to splits."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rldecoder.data.documents import (
    assign_split,
    clean_text,
    paragraphs,
    plain,
    split_text,
    unit_hash,
)

FRACTIONS = {"train": 0.7, "validation": 0.1, "label": 0.1, "test": 0.1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("a  \n\n\n\n\tb\t", "a\n\n\tb"),
        ("\n\na\x00\x07b\n", "ab"),
        ("e\u0301", "\u00e9"),
        ("x\ud800y", "xy"),
        ("", ""),
    ],
)
def test_clean_text(text: str, expected: str) -> None:
    assert clean_text(text) == expected


def test_long_text_is_cut_at_a_line_end() -> None:
    assert clean_text("first line\nsecond line\nthird", 24) == "first line\nsecond line"
    assert clean_text("oneverylongline", 4) == "onev"


@given(st.text(), st.integers(1, 50))
def test_clean_text_is_stable_encodable_and_bounded(text: str, limit: int) -> None:
    cleaned = clean_text(text, limit)
    assert clean_text(cleaned, limit) == cleaned
    assert len(cleaned) <= limit
    cleaned.encode()


def test_pieces_hold_the_whole_text() -> None:
    text = clean_text("\n".join(f"line {i} " + "word " * (i % 7) for i in range(200)))
    pieces = split_text(text, 100)
    assert "\n".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    assert split_text(text, None) == [text]
    assert split_text("", 5) == [""]
    # A title before one long line: a piece of the title alone would be too short to keep.
    long = "Title\n" + "word " * 50
    assert split_text(long, 60)[0] == "Title"
    first, *others = split_text(long, 60, min_chars=20)
    assert first == ("Title\n" + "word " * 11)[:60].rsplit(" ", 1)[0]
    assert "".join([first, *others]).replace(" ", "") == long.replace(" ", "")


def test_paragraphs_hold_the_whole_text_in_pieces_of_about_one_length() -> None:
    text = "\n\n".join(f"{i} " + "word " * (i % 40) for i in range(400))
    pieces = list(paragraphs(text, 500))
    assert "".join(pieces) == text
    assert all(250 <= len(piece) <= 1000 for piece in pieces)
    assert all(piece.startswith("\n\n") for piece in pieces[1:])
    # Without paragraphs or lines: at a word, or anywhere.
    assert [len(p) for p in paragraphs("x" * 1000, 300)] == [300, 300, 400]
    assert "".join(paragraphs("ab " * 500, 100)) == "ab " * 500
    assert list(paragraphs("short", 300)) == ["short"]


def test_plain_text_is_one_line_without_control_characters() -> None:
    assert plain(" a\tb\n\x1b[2Jc\ud800\x85 ") == "a b [2Jc"


def test_split_depends_on_key_and_seed_only() -> None:
    keys = [f"doc {i}" for i in range(4000)]
    first = [assign_split(key, 1, FRACTIONS) for key in keys]
    assert first == [assign_split(key, 1, FRACTIONS) for key in keys]
    assert first != [assign_split(key, 2, FRACTIONS) for key in keys]
    counts = Counter(first)
    for name, share in FRACTIONS.items():
        assert counts[name] / len(keys) == pytest.approx(share, abs=0.03)


def test_unit_hash_separates_its_parts() -> None:
    assert unit_hash("a", "bc") != unit_hash("ab", "c")
    assert 0 <= unit_hash("a") < 1
