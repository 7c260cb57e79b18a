"""Duplicates across splits: the same text, or nearly the same, must not be on both sides."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from functools import cache
from typing import Any, Literal, NamedTuple
from weakref import finalize

import numpy as np
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
_TABLES = """
    PRAGMA journal_mode = OFF; -- nobody needs what a killed process remembered
    PRAGMA cache_size = -16384; -- KiB that stay in memory
    CREATE TABLE texts (words BLOB PRIMARY KEY, split TEXT) WITHOUT ROWID;
    CREATE TABLE documents (number INTEGER PRIMARY KEY, signature BLOB);
    CREATE TABLE bands (
        band BLOB, split TEXT, document INTEGER, PRIMARY KEY (band, split, document)
    ) WITHOUT ROWID;
    BEGIN;
"""


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

    What is remembered (1.4 kB a document) lies in a temporary file of SQLite's, so that memory
    does not grow with the text. SQLITE_TMPDIR says in which folder; the file has no name there and
    goes with the process.
    """

    def __init__(self, jaccard: float) -> None:
        """`jaccard`: overlap from which on two documents count as duplicates, 0 to 1."""
        self._jaccard = jaccard
        self._bands = _bands(jaccard)
        self._num_documents = 0
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.executescript(_TABLES)
        finalize(self, self._database.close)
        marks = ", ".join("?" * len(self._bands))
        self._alike = (
            "SELECT signature FROM documents WHERE number IN"
            f" (SELECT document FROM bands WHERE band IN ({marks}) AND split != ?)"
        )

    def admit(self, split: str, found: Fingerprint) -> Literal["exact", "near"] | None:
        """Return what kind of duplicate of another split a text is; remember it if it is none."""
        ask = self._database.execute
        owner = ask("SELECT split FROM texts WHERE words = ?", (found.words,)).fetchone()
        if owner is not None:
            return None if owner[0] == split else "exact"

        # Whoever shares a band is looked at; the number in front keeps bands apart.
        signature = found.signature.astype(np.int64)
        bands = [
            bytes([number]) + signature[band].tobytes() for number, band in enumerate(self._bands)
        ]
        for (content,) in ask(self._alike, (*bands, split)):
            same = np.count_nonzero(np.frombuffer(content, np.int64) == signature)
            if same / NUM_PERMUTATIONS >= self._jaccard:
                return "near"

        number = self._num_documents
        ask("INSERT INTO texts VALUES (?, ?)", (found.words, split))
        ask("INSERT INTO documents VALUES (?, ?)", (number, signature.tobytes()))
        self._database.executemany(
            "INSERT INTO bands VALUES (?, ?, ?)", [(band, split, number) for band in bands]
        )
        self._num_documents += 1
        return None


def _bands(jaccard: float) -> list[slice]:
    """Parts of a signature, as many and as long as make the fewest errors at this overlap: alike
    are those that have one in common."""
    index = MinHashLSH(threshold=jaccard, num_perm=NUM_PERMUTATIONS)
    return [slice(first, end) for first, end in index.hashranges]


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
