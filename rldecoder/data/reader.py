"""The reader: original prose that comes with the project, so that a default corpus holds some.

About 260 short pieces (stories, dialogues, letters, explanations, instructions, reports, plays,
essays, lives, journeys, fables, verses, sums in words, rules, abstracts, questions, encyclopedia
and textbook articles, fact sheets, news, statutes), written for this project. No two are alike,
and each is a document: what is held out is whole pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from rldecoder.data.documents import Candidate, Document

READER_LICENCE = "Apache-2.0"
_FOLDER = Path(__file__).parent / "reader"


def reader_candidates() -> Iterator[Candidate]:
    """The pieces as documents, in the order of their names."""
    for path in _pieces():
        name = path.relative_to(_FOLDER).with_suffix("").as_posix()
        yield Candidate(f"reader:{name}", partial(_document, path, name))


def reader_fingerprint() -> dict[str, str]:
    """What the pieces are: a hash over their names and texts."""
    digest = hashlib.sha256()
    for path in _pieces():
        digest.update(f"{path.relative_to(_FOLDER).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return {"texts": digest.hexdigest()}


@cache
def _pieces() -> tuple[Path, ...]:
    return tuple(sorted(_FOLDER.glob("*/*.txt"), key=lambda path: path.as_posix()))


def _document(path: Path, name: str) -> Document:
    text = path.read_text(encoding="utf-8")
    title = path.stem.replace("-", " ")
    return Document(f"reader:{name}", title, "rldecoder reader", READER_LICENCE, text)
