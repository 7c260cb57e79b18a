"""Duplicates across splits, against exact Jaccard indices."""

from __future__ import annotations

import random

import pytest

from rldecoder.data.deduplicate import SHINGLE_WORDS, CrossSplitDeduplicator


def words(count: int, seed: int) -> list[str]:
    return [f"w{random.Random(f'{seed} {i}').randrange(10_000)}" for i in range(count)]


def exact_jaccard(a: list[str], b: list[str]) -> float:
    def shingles(text: list[str]) -> set[tuple[str, ...]]:
        return {tuple(text[i : i + SHINGLE_WORDS]) for i in range(len(text) - SHINGLE_WORDS + 1)}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_exact_copy_is_found_across_splits_only() -> None:
    found = CrossSplitDeduplicator(0.5)
    assert found.admit("train", "The Hat, is in the box.") is None
    assert found.admit("train", "The Hat, is in the box.") is None
    assert found.admit("test", "the hat is in the BOX") == "exact"
    assert found.admit("test", "the cup is on the shelf") is None
    assert found.admit("train", "the cup is on the shelf") == "exact"


@pytest.mark.parametrize(("changed", "duplicate"), [(4, True), (60, False)])
def test_near_copies_by_overlap(changed: int, duplicate: bool) -> None:
    text = words(300, 0)
    edited = list(text)
    for i in range(0, 300, 300 // changed):
        edited[i] = f"new{i}"
    assert (exact_jaccard(text, edited) > 0.5) == duplicate
    found = CrossSplitDeduplicator(0.5)
    assert found.admit("train", " ".join(text)) is None
    assert found.admit("test", " ".join(edited)) == ("near" if duplicate else None)


def test_near_copy_within_a_split_stays_and_still_guards_the_other() -> None:
    text = words(200, 1)
    near = [*text[:-3], "x", "y", "z"]
    found = CrossSplitDeduplicator(0.5)
    assert found.admit("train", " ".join(text)) is None
    assert found.admit("train", " ".join(near)) is None
    assert found.admit("ood", " ".join([*near, "more"])) == "near"


def test_texts_shorter_than_a_shingle() -> None:
    found = CrossSplitDeduplicator(0.5)
    assert found.admit("train", "two words") is None
    assert found.admit("test", "other words") is None
    assert found.admit("test", "!!!") is None
    assert found.admit("train", "???") == "exact"
