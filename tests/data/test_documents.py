"""Cleaning and the assignment of documents to splits."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rldecoder.data.documents import assign_split, clean_text, unit_hash

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
