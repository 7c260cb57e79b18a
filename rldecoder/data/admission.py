"""Which documents are worth packing: long enough, of a split with room, in no other split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from rldecoder.config.data import IngestConfig
from rldecoder.data.deduplicate import CrossSplitDeduplicator
from rldecoder.data.documents import Candidate, Document, clean_text, split_text
from rldecoder.data.packing import SequencePacker
from rldecoder.data.text_shards import Item, ReadyText

ChooseSplit = Callable[[str], str]
"""The split of a document, by its key."""


class Admitted(NamedTuple):
    """A clean document with its split, no duplicate of another split."""

    split: str
    document: Document
    token_ids: list[int]


class _Piece(NamedTuple):
    """A document that was read, or a part of it."""

    candidate: Candidate
    split: str
    document: Document | None
    """None where there is no text in it."""
    text: str
    """The piece, clean."""
    number: int
    """From 1."""
    unread: int
    """Of the first piece: characters of the others."""


class MakeReady(Protocol):
    """Tokenises and fingerprints texts, in order; it may read some of them ahead."""

    def __call__(self, items: Iterator[Item]) -> Iterator[tuple[Item, ReadyText]]:
        """Each item with what was made of its text."""
        ...


class Admission:
    """Lets documents through to the packers of their splits, and counts what it leaves out.

    Args:
        packers: one a split with a budget; a full one takes no more.
        config: lengths, and how alike duplicates are.
        make_ready: tokenises; see `rldecoder.data.text_shards.ReadAhead`.
    """

    def __init__(
        self,
        packers: Mapping[str, SequencePacker],
        config: IngestConfig,
        make_ready: MakeReady,
    ) -> None:
        self._packers, self._config, self._make_ready = packers, config, make_ready
        self._deduplicator = CrossSplitDeduplicator(config.near_duplicate_jaccard)
        self._duplicates: set[str] = set()
        """Keys of documents of which nothing more is read."""
        self.dropped: Counter[str] = Counter()
        """Documents left out, by reason."""
        self.cut: Counter[str] = Counter()
        """Characters of each split's documents that `max_document_chars` has left unread so far."""
        self.unread: Counter[str] = Counter()
        """Characters left unread of each of the user's documents that was begun, by its key."""
        self.continued = 0
        """Documents that were read on because a budget was not filled by their beginnings."""

    @property
    def has_more(self) -> bool:
        """Whether a split with room was cut short."""
        return any(self.cut[name] > 0 and self._has_room(name) for name in self._packers)

    def beginnings(
        self, stream: Iterator[Candidate], choose_split: ChooseSplit
    ) -> Iterator[Admitted]:
        """Documents, of long ones their beginnings. The split is known before a document is read,
        so text that no budget has room for is never parsed."""
        for one, ready in self._make_ready(self._read_beginnings(stream, choose_split)):
            # A budget may have been filled since it was read ahead.
            if not self._has_room(one.split):
                continue
            if one.document is None:
                self.dropped["no_text"] += 1
                continue
            if len(one.text) < self._config.min_document_chars:
                self.dropped["too_short"] += 1
                continue

            # Nothing of a duplicate is read on either: its rest would be one, too.
            if self._is_duplicate(one.split, ready):
                self._duplicates.add(one.candidate.key)
                continue
            self.cut[one.split] += one.unread
            if one.candidate.users and one.unread:
                self.unread[one.candidate.key] = one.unread
            yield Admitted(one.split, one.document._replace(text=one.text), ready.token_ids)

    def rests(self, stream: Iterator[Candidate], choose_split: ChooseSplit) -> Iterator[Admitted]:
        """What `max_document_chars` cut off the user's documents, for budgets that are not filled.

        The documentation of packages is not read on: it is there to fill small budgets, and what
        it gives stays as it was."""
        for one, ready in self._make_ready(self._read_rests(stream, choose_split)):
            if not self._has_room(one.split) or one.document is None:
                continue
            self.continued += one.number == 2
            self.cut[one.split] -= len(one.text)
            self.unread[one.candidate.key] -= len(one.text)
            if not self._is_duplicate(one.split, ready):
                document = one.document
                title = f"{document.title} (part {one.number})"
                document = document._replace(title=title, text=one.text)
                yield Admitted(one.split, document, ready.token_ids)

    def _read_beginnings(
        self, stream: Iterator[Candidate], choose_split: ChooseSplit
    ) -> Iterator[_Piece]:
        for candidate in stream:
            split = candidate.split or choose_split(candidate.key)
            if not self._has_room(split):
                continue
            document = candidate.load()
            text, *rest = [""] if document is None else self._pieces(candidate, document)
            yield _Piece(candidate, split, document, text, 1, sum(map(len, rest)))

    def _read_rests(
        self, stream: Iterator[Candidate], choose_split: ChooseSplit
    ) -> Iterator[_Piece]:
        """Each piece is a document of its own, of the same split."""
        for candidate in stream:
            split = candidate.split or choose_split(candidate.key)
            if not candidate.users or candidate.key in self._duplicates:
                continue
            if not self._has_room(split):
                continue
            document = candidate.load()
            pieces = self._pieces(candidate, document) if document is not None else []
            if len(pieces) < 2 or len(pieces[0]) < self._config.min_document_chars:
                continue
            for number, text in enumerate(pieces[1:], start=2):
                if not self._has_room(split):
                    break
                yield _Piece(candidate, split, document, text, number, 0)

    def _has_room(self, split: str) -> bool:
        return split in self._packers and not self._packers[split].full

    def _is_duplicate(self, split: str, text: ReadyText) -> bool:
        """Whether another split has the text; it is then counted."""
        kind = self._deduplicator.admit(split, text.fingerprint)
        if kind is not None:
            self.dropped[f"{kind}_duplicates_across_splits"] += 1
        return kind is not None

    def _pieces(self, candidate: Candidate, document: Document) -> list[str]:
        """A document in pieces of `max_document_chars`. A user's never begins with less than is
        kept, as one whose title is followed by a long line would."""
        least = self._config.min_document_chars if candidate.users else 0
        return split_text(clean_text(document.text), self._config.max_document_chars, least)
