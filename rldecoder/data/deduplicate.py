"""Duplicates across splits: the same text, or nearly the same, must not be on both sides."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

from datasketch import MinHash, MinHashLSH

_WORD = re.compile(r"\w+")
NUM_PERMUTATIONS = 64
"""Standard error of the Jaccard estimate is at most 0.5 / sqrt(64) = 0.06."""
SHINGLE_WORDS = 5


class CrossSplitDeduplicator:
    """Remembers every accepted document; finds those that another split already has.

    Exact: equal words, ignoring case and punctuation. Near: Jaccard index of 5-word shingles,
    estimated by MinHash (Broder 1997) and looked up by locality-sensitive hashing. Duplicates
    within a split are let through: they leak nothing.
    """

    def __init__(self, jaccard: float) -> None:
        """`jaccard`: overlap from which on two documents count as duplicates, 0 to 1."""
        self._jaccard = jaccard
        self._lsh = MinHashLSH(threshold=jaccard, num_perm=NUM_PERMUTATIONS)
        self._signatures: list[tuple[str, MinHash]] = []
        self._splits_of_text: dict[bytes, str] = {}

    def admit(self, split: str, text: str) -> Literal["exact", "near"] | None:
        """Return what kind of duplicate of another split `text` is; remember it if it is none."""
        words = _WORD.findall(text.lower())
        digest = hashlib.sha256(" ".join(words).encode()).digest()
        owner = self._splits_of_text.get(digest)
        if owner is not None:
            return None if owner == split else "exact"
        signature = _signature(words)
        for index in self._lsh.query(signature):
            other_split, other = self._signatures[index]
            if other_split != split and signature.jaccard(other) >= self._jaccard:
                return "near"
        self._splits_of_text[digest] = split
        self._lsh.insert(len(self._signatures), signature)
        self._signatures.append((split, signature))
        return None


def _signature(words: list[str]) -> MinHash:
    signature = MinHash(num_perm=NUM_PERMUTATIONS, seed=1)
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(count)}
    signature.update_batch([shingle.encode() for shingle in shingles])
    return signature
