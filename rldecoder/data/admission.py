"""Which documents are worth packing: long enough, of a split with room, in no other split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from rldecoder.config.data import IngestConfig
from rldecoder.data.deduplicate import CrossSplitDeduplicator
from rldecoder.data.documents import Candidate, Document, clean_text, split_text
from rldecoder.data.packing import SequencePacker

ChooseSplit = Callable[[str], str]
"""The split of a document, by its key."""


class Admitted(NamedTuple):
    """A clean document with its split, no duplicate of another split."""

    split: str
    document: Document


class Admission:
    """Lets documents through to the packers of their splits, and counts what it leaves out.

    Args:
        packers: one a split with a budget; a full one takes no more.
        config: lengths, and how alike duplicates are.
    """

    def __init__(self, packers: Mapping[str, SequencePacker], config: IngestConfig) -> None:
        self._packers, self._config = packers, config
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
        for candidate in stream:
            split = candidate.split or choose_split(candidate.key)
            if not self._has_room(split):
                continue
            document = candidate.load()
            if document is None:
                self.dropped["no_text"] += 1
                continue
            text, *rest = self._pieces(candidate, document)
            if len(text) < self._config.min_document_chars:
                self.dropped["too_short"] += 1
                continue

            # Nothing of a duplicate is read on either: its rest would be one, too.
            if self._is_duplicate(split, text):
                self._duplicates.add(candidate.key)
                continue
            self.cut[split] += sum(map(len, rest))
            if candidate.users and rest:
                self.unread[candidate.key] = sum(map(len, rest))
            yield Admitted(split, document._replace(text=text))

    def rests(self, stream: Iterator[Candidate], choose_split: ChooseSplit) -> Iterator[Admitted]:
        """What `max_document_chars` cut off the user's documents, for budgets that are not filled.

        The documentation of packages is not read on: it is there to fill small budgets, and what
        it gives stays as it was."""
        for candidate in stream:
            split = candidate.split or choose_split(candidate.key)
            if not candidate.users or candidate.key in self._duplicates:
                continue
            if not self._has_room(split):
                continue
            document = candidate.load()
            pieces = self._pieces(candidate, document) if document is not None else []
            least = self._config.min_document_chars
            if document is None or len(pieces) < 2 or len(pieces[0]) < least:
                continue

            # Each piece is a document of its own, of the same split.
            self.continued += 1
            for number, text in enumerate(pieces[1:], start=2):
                if not self._has_room(split):
                    break
                self.cut[split] -= len(text)
                self.unread[candidate.key] -= len(text)
                if not self._is_duplicate(split, text):
                    title = f"{document.title} (part {number})"
                    yield Admitted(split, document._replace(title=title, text=text))

    def _has_room(self, split: str) -> bool:
        return split in self._packers and not self._packers[split].full

    def _is_duplicate(self, split: str, text: str) -> bool:
        """Whether another split has the text; it is then counted."""
        kind = self._deduplicator.admit(split, text)
        if kind is not None:
            self.dropped[f"{kind}_duplicates_across_splits"] += 1
        return kind is not None

    def _pieces(self, candidate: Candidate, document: Document) -> list[str]:
        """A document in pieces of `max_document_chars`. A user's never begins with less than is
        kept, as one whose title is followed by a long line would."""
        least = self._config.min_document_chars if candidate.users else 0
        return split_text(clean_text(document.text), self._config.max_document_chars, least)
