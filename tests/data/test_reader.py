"""The reader's pieces: enough of them, no two alike, and none lost on the way to documents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rldecoder.config.data import ReaderSource
from rldecoder.data.deduplicate import CrossSplitDeduplicator
from rldecoder.data.deduplicate import fingerprint as text_fingerprint
from rldecoder.data.documents import clean_text
from rldecoder.data.reader import reader_candidates, reader_fingerprint
from rldecoder.data.sources import candidates, fingerprint


def test_there_are_enough_pieces_of_many_kinds() -> None:
    documents = [candidate.load() for candidate in reader_candidates()]
    texts = [document.text for document in documents if document is not None]
    assert len(texts) == len(documents) >= 200
    # 46,000 words are about 60,000 tokens of a tokenizer with 50k entries.
    assert sum(len(text.split()) for text in texts) >= 46_000
    kinds = Counter(document.key.split("/")[0] for document in documents if document)
    assert len(kinds) >= 12
    assert {document.licence for document in documents if document} == {"Apache-2.0"}


def test_no_two_pieces_are_alike() -> None:
    deduplicator = CrossSplitDeduplicator(0.2)
    for number, candidate in enumerate(reader_candidates()):
        document = candidate.load()
        assert document is not None
        # A split each, so that every pair is compared.
        assert deduplicator.admit(str(number), text_fingerprint(document.text)) is None, (
            document.title
        )


def test_pieces_are_plain_text_of_the_length_that_is_read() -> None:
    for candidate in reader_candidates():
        document = candidate.load()
        assert document is not None
        text = clean_text(document.text)
        assert text == document.text.rstrip("\n")
        assert len(text) >= 200, document.title


def test_as_a_source_it_is_shuffled_by_seed_and_fingerprinted() -> None:
    def keys(seed: int) -> list[str]:
        found = candidates([ReaderSource()], seed=seed, shuffle_buffer=8)
        return [candidate.key for candidate in found]

    assert keys(0) == keys(0) != keys(1)
    assert sorted(keys(0)) == sorted(candidate.key for candidate in reader_candidates())
    (value,) = reader_fingerprint().values()
    assert fingerprint([ReaderSource()]) == {"0.reader.texts": value}


def test_the_wheel_carries_the_pieces() -> None:
    root = Path(__file__).parents[2]
    assert '"data/reader/*/*.txt"' in (root / "pyproject.toml").read_text(encoding="utf-8")
