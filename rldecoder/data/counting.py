"""How much text there is: documents, characters and tokens of each split, before any run.

The split of a document hangs on its key and the run's seed, so what is counted here is what
`ingest` will find, but for near-duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from rldecoder.config.data import IngestConfig, Source
from rldecoder.data.documents import assign_split, clean_text
from rldecoder.data.sources import candidates

_BATCH = 32

Encode = Callable[[list[str]], list[list[int]]]
"""Token ids of some texts."""


class TextCount(NamedTuple):
    """What some sources hold."""

    documents: int
    """Long enough to be kept."""
    characters: int
    longest: int
    """Characters of the longest document."""
    tokens: dict[str, int]
    """By split, one token between documents included."""
    complete: bool
    """Whether all of the text was counted."""
    dropped: dict[str, int]
    """Documents that are no text or too short, by reason."""

    @property
    def total(self) -> int:
        """Tokens of all splits."""
        return sum(self.tokens.values())


def count_text(
    sources: Sequence[Source], config: IngestConfig, seed: int, encode: Encode, *, most_tokens: int
) -> TextCount:
    """Count the in-domain text of a run.

    Args:
        config: decides what is kept and how documents are dealt to splits.
        seed: the stage's, not the run's.
        encode: the tokenizer.
        most_tokens: counting ends after so many.

    Raises:
        BadInputError: a source is missing or cannot be read.
    """
    dropped: Counter[str] = Counter()
    shares = config.fractions.model_dump()
    tokens = dict.fromkeys(shares, 0)
    documents = characters = longest = 0
    texts = _texts(sources, config, seed, dropped)
    while batch := list(islice(texts, _BATCH)):
        encoded = encode([text for _, text in batch])
        for (key, text), ids in zip(batch, encoded, strict=True):
            tokens[assign_split(key, seed, shares)] += len(ids) + 1
            documents += 1
            characters += len(text)
            longest = max(longest, len(text))
        if sum(tokens.values()) >= most_tokens:
            return TextCount(documents, characters, longest, tokens, False, dict(dropped))
    return TextCount(documents, characters, longest, tokens, True, dict(dropped))


def _texts(
    sources: Sequence[Source], config: IngestConfig, seed: int, dropped: Counter[str]
) -> Iterator[tuple[str, str]]:
    found = candidates(
        sources, seed=seed, shuffle_buffer=config.shuffle_buffer_documents, dropped=dropped
    )
    for candidate in found:
        document = candidate.load()
        text = "" if document is None else clean_text(document.text, config.max_document_chars)
        if len(text) < config.min_document_chars:
            dropped["too_short"] += 1
        else:
            yield candidate.key, text
