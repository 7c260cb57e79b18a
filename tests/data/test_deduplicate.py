"""Duplicates across splits, against exact Jaccard indices."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from rldecoder.data.deduplicate import (
    NUM_PERMUTATIONS,
    SHINGLE_WORDS,
    CrossSplitDeduplicator,
    Fingerprint,
    fingerprint,
)


def words(count: int, seed: int) -> list[str]:
    return [f"w{random.Random(f'{seed} {i}').randrange(10_000)}" for i in range(count)]


def exact_jaccard(a: list[str], b: list[str]) -> float:
    def shingles(text: list[str]) -> set[tuple[str, ...]]:
        return {tuple(text[i : i + SHINGLE_WORDS]) for i in range(len(text) - SHINGLE_WORDS + 1)}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_exact_copy_is_found_across_splits_only() -> None:
    found = CrossSplitDeduplicator(0.5)
    assert found.admit("train", fingerprint("The Hat, is in the box.")) is None
    assert found.admit("train", fingerprint("The Hat, is in the box.")) is None
    assert found.admit("test", fingerprint("the hat is in the BOX")) == "exact"
    assert found.admit("test", fingerprint("the cup is on the shelf")) is None
    assert found.admit("train", fingerprint("the cup is on the shelf")) == "exact"


@pytest.mark.parametrize(("changed", "duplicate"), [(4, True), (60, False)])
def test_near_copies_by_overlap(changed: int, duplicate: bool) -> None:
    text = words(300, 0)
    edited = list(text)
    for i in range(0, 300, 300 // changed):
        edited[i] = f"new{i}"
    assert (exact_jaccard(text, edited) > 0.5) == duplicate
    found = CrossSplitDeduplicator(0.5)
    assert found.admit("train", fingerprint(" ".join(text))) is None
    assert found.admit("test", fingerprint(" ".join(edited))) == ("near" if duplicate else None)


def test_near_copy_within_a_split_stays_and_still_guards_the_other() -> None:
    text = words(200, 1)
    near = [*text[:-3], "x", "y", "z"]
    found = CrossSplitDeduplicator(0.5)
    assert found.admit("train", fingerprint(" ".join(text))) is None
    assert found.admit("train", fingerprint(" ".join(near))) is None
    assert found.admit("ood", fingerprint(" ".join([*near, "more"]))) == "near"


def test_texts_shorter_than_a_shingle() -> None:
    found = CrossSplitDeduplicator(0.5)
    assert found.admit("train", fingerprint("two words")) is None
    assert found.admit("test", fingerprint("other words")) is None
    assert found.admit("test", fingerprint("!!!")) is None
    assert found.admit("train", fingerprint("???")) == "exact"


def test_decisions_are_those_of_an_index_in_memory() -> None:
    """datasketch's own index over copies that share more and less, in three splits."""
    rnd = random.Random(0)
    originals = [words(60, seed) for seed in range(6)]
    texts = []
    for _ in range(150):
        changed = list(rnd.choice(originals))
        for place in rnd.sample(range(60), rnd.choice([0, 0, 1, 2, 4, 8, 16])):
            changed[place] = f"new{rnd.randrange(3)}"
        texts.append((rnd.choice(["train", "test", "ood"]), " ".join(changed)))

    index = MinHashLSH(threshold=0.5, num_perm=NUM_PERMUTATIONS)
    kept: list[tuple[str, MinHash]] = []
    owners: dict[bytes, str] = {}
    expected: list[str | None] = []
    for split, text in texts:
        mark = fingerprint(text)
        known = MinHash(num_perm=NUM_PERMUTATIONS, seed=1)
        known.hashvalues = mark.signature
        owner = owners.get(mark.words)
        alike = [kept[number] for number in index.query(known)]
        if owner is not None:
            expected.append(None if owner == split else "exact")
        elif any(where != split and known.jaccard(one) >= 0.5 for where, one in alike):
            expected.append("near")
        else:
            expected.append(None)
            owners[mark.words] = split
            index.insert(len(kept), known)
            kept.append((split, known))

    found = CrossSplitDeduplicator(0.5)
    assert [found.admit(split, fingerprint(text)) for split, text in texts] == expected
    assert min(expected.count(kind) for kind in (None, "exact", "near")) > 5


def test_memory_does_not_grow_with_the_documents() -> None:
    """Of Python; what SQLite holds has a limit of its own."""
    found, rnd = CrossSplitDeduplicator(0.5), np.random.default_rng(0)

    def admit(count: int) -> None:
        for row in rnd.integers(0, 1 << 32, (count, NUM_PERMUTATIONS)):
            assert found.admit("train", Fingerprint(row[:4].tobytes(), row)) is None

    admit(100)
    tracemalloc.start()
    admit(1000)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 50_000


def letters(first: int, count: int) -> list[str]:
    return [chr(first + i) for i in range(count)]


UNSPACED = {
    "Chinese": (letters(0x4E00, 3000), "\uff0c"),
    "Japanese": (letters(0x3042, 80) + letters(0x4E00, 500), "\u3002"),
    "Thai": (letters(0x0E01, 46) + letters(0x0E47, 7), " "),
    "Khmer": (letters(0x1780, 60), "\u17d4"),
    "no spaces": (letters(0x61, 26), "."),
    "no punctuation": (letters(0x61, 26), ""),
}


@pytest.mark.parametrize("name", UNSPACED)
def test_near_copies_in_text_without_spaces(name: str) -> None:
    """3 of 300 characters changed: some clauses, as words, are still the same; most are not."""
    pool, mark = UNSPACED[name]
    missed = 0
    for seed in range(12):
        rnd = random.Random(seed)
        clauses = ["".join(rnd.choices(pool, k=rnd.randrange(14, 25))) for _ in range(16)]
        text = mark.join(clauses)
        copy = list(text)
        for place in rnd.sample([i for i, char in enumerate(copy) if char != mark], 3):
            copy[place] = rnd.choice(pool)
        found = CrossSplitDeduplicator(0.5)
        assert found.admit("train", fingerprint(text)) is None
        missed += found.admit("test", fingerprint("".join(copy))) is None
        other = mark.join("".join(rnd.choices(pool, k=20)) for _ in range(16))
        assert found.admit("test", fingerprint(other)) is None
    assert missed == 0


def test_words_with_spaces_stay_words() -> None:
    """Mixed text: characters of one script, words of the other."""
    english = " ".join(f"word{i}" for i in range(40))
    found = CrossSplitDeduplicator(0.5)
    assert found.admit("train", fingerprint(english + " \u4e2d\u6587\u5b57")) is None
    assert found.admit("test", fingerprint(english + " \u5b57\u6587")) == "near"
    assert found.admit("test", fingerprint(" ".join(f"drow{i}" for i in range(40)))) is None
