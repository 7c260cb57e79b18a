"""Duplicates across splits: the same text, or nearly the same, must not be on both sides."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import Any, Literal, NamedTuple

from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf"  # Khmer, Tai
    "\u3005-\u3007\u3021-\u3029\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese
)
"""Scripts that put no space between words: each character of them is a word here."""
_WORD = re.compile(r"\w+")
_WORD_OR_CHARACTER = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")
_LONGEST_WORD, _LONGEST_MEAN = 128, 14
"""Longer words, or longer ones on average, are text without spaces; code and prose have none."""
NUM_PERMUTATIONS = 64
"""Standard error of the Jaccard estimate is at most 0.5 / sqrt(64) = 0.06."""
SHINGLE_WORDS = 5


class Fingerprint(NamedTuple):
    """What is compared of a text."""

    words: bytes
    """SHA-256 of its words."""
    signature: NDArray[Any]
    """[NUM_PERMUTATIONS] MinHash of its shingles."""


def fingerprint(text: str) -> Fingerprint:
    """Of a text, whatever else there is."""
    words = _words(text.lower())
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return Fingerprint(digest, _signature(words).hashvalues)


class CrossSplitDeduplicator:
    """Remembers every accepted document; finds those that another split already has.

    Exact: equal words, ignoring case and punctuation. Near: Jaccard index of 5-word shingles,
    estimated by MinHash (Broder 1997) and looked up by locality-sensitive hashing; characters
    stand for words where there are no spaces. Duplicates within a split are let through: they
    leak nothing.
    """

    def __init__(self, jaccard: float) -> None:
        """`jaccard`: overlap from which on two documents count as duplicates, 0 to 1."""
        self._jaccard = jaccard
        self._lsh = MinHashLSH(threshold=jaccard, num_perm=NUM_PERMUTATIONS)
        self._signatures: list[tuple[str, MinHash]] = []
        self._splits_of_text: dict[bytes, str] = {}

    def admit(self, split: str, found: Fingerprint) -> Literal["exact", "near"] | None:
        """Return what kind of duplicate of another split a text is; remember it if it is none."""
        owner = self._splits_of_text.get(found.words)
        if owner is not None:
            return None if owner == split else "exact"
        signature = _empty().copy()
        signature.hashvalues = found.signature.astype(signature.hashvalues.dtype)
        for index in self._lsh.query(signature):
            other_split, other = self._signatures[index]
            if other_split != split and signature.jaccard(other) >= self._jaccard:
                return "near"
        self._splits_of_text[found.words] = split
        self._lsh.insert(len(self._signatures), signature)
        self._signatures.append((split, signature))
        return None


def _words(text: str) -> list[str]:
    """Words; characters where there are no spaces between words."""
    # The first is faster, and finds the same where there is no other script.
    words = (_WORD if text.isascii() else _WORD_OR_CHARACTER).findall(text)
    if words and sum(map(len, words)) > _LONGEST_MEAN * len(words):
        return list("".join(words))
    if any(len(word) > _LONGEST_WORD for word in words):
        return [part for word in words for part in (word if len(word) > _LONGEST_WORD else [word])]
    return words


@cache
def _empty() -> MinHash:
    """Of no text; its permutations, drawn once, are those of all."""
    return MinHash(num_perm=NUM_PERMUTATIONS, seed=1)


def _signature(words: list[str]) -> MinHash:
    signature = _empty().copy()
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(count)}
    signature.update_batch([shingle.encode() for shingle in shingles])
    return signature
