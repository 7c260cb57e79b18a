"""Documents: what a source yields, how text is cleaned, and which split a document goes to."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

# Control characters apart from newline and tab; zero-width and bidirectional marks stay, since
# scripts need them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_TRAILING_SPACE = re.compile(r"[ \t]+(?=\n|$)")
_BLANK_LINES = re.compile(r"\n{3,}")


class Document(NamedTuple):
    """One text with its origin."""

    key: str
    """Stable identity: decides the split, and stays the same when the text is edited."""
    title: str
    source: str
    """Where it is from, with the version where there is one (`numpy==2.4.6`)."""
    licence: str
    """SPDX identifier where known, else `unknown`."""
    text: str


class Candidate(NamedTuple):
    """A document that has a key, but has not been read yet."""

    key: str
    load: Callable[[], Document | None]
    """Reads it; None when there is no text in it."""
    users: bool = False
    """Whether it is a text of the user's own, of which none may be lost to a length limit."""
    split: str | None = None
    """The one split that it may go to (None: its key decides)."""


def clean_text(text: str, max_chars: int | None = None) -> str:
    """Normalise Unicode (NFC), line ends and blank lines; drop control characters.

    Args:
        max_chars: cut longer texts at the last line end before this many characters.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _BLANK_LINES.sub("\n\n", _TRAILING_SPACE.sub("", _CONTROL.sub("", text))).strip("\n")
    # A lone surrogate (from JSON escapes) is no character and cannot be encoded.
    text = text.encode("utf-8", "ignore").decode("utf-8")
    return text if max_chars is None else split_text(text, max_chars)[0]


def split_text(text: str, max_chars: int | None, min_chars: int = 0) -> list[str]:
    """A clean text in pieces of at most `max_chars` that end with a line; one piece if it fits.

    Args:
        text: from `clean_text`.
        max_chars: characters a piece (None: no limit).
        min_chars: where the last line end leaves less, a piece ends with a word or anywhere.
    """
    pieces = []
    while max_chars is not None and len(text) > max_chars:
        head = text[:max_chars]
        end = head.rfind("\n")
        if end >= 0 and end < min_chars:
            end = head.rfind(" ")
        if end < max(min_chars, 0):
            end = max_chars
        pieces.append(head[:end].rstrip())
        text = text[end:].lstrip("\n")
    return [*pieces, text] if text or not pieces else pieces


def paragraphs(text: str, chars: int) -> Iterator[str]:
    """A text in pieces of about `chars` characters that end with a paragraph; nothing is lost.

    Where no paragraph ends within twice as many, a piece ends with a line, a word or anywhere.
    """
    start = 0
    while len(text) - start > chars * 3 // 2:
        window = text[start : start + 2 * chars]
        # The first end behind the wanted length is nearer to it than the last before it, as a rule.
        end = window.find("\n\n", chars)
        for mark in ("\n\n", "\n", " "):
            if end < 0:
                end = window.rfind(mark, chars // 2)
        end = chars if end < 0 else end
        yield text[start : start + end]
        start += end
    yield text[start:]


def plain(text: str) -> str:
    """Text that can be stored and shown on a terminal: one line, no control characters."""
    kept = "".join(" " if char.isspace() else char for char in text)
    return "".join(c for c in kept if unicodedata.category(c) not in ("Cc", "Cs")).strip()


def unit_hash(*parts: str | int) -> float:
    """A number in [0, 1) that depends on the parts only, uniform over different parts."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def assign_split(key: str, seed: int, fractions: Mapping[str, float]) -> str:
    """The split of a document: a hash of (seed, key) against cumulated fractions.

    Args:
        seed: seed of the ingestion.
        fractions: share of each split, in order; they sum to 1.
    """
    point, total = unit_hash("split", seed, key), 0.0
    for name, share in fractions.items():
        total += share
        if point < total:
            return name
    return name  # rounding may leave the sum a hair below 1
