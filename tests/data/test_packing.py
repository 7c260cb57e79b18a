"""Packing against a naive list implementation."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rldecoder.data.packing import PackedSequence, SequencePacker

EOS = 0


def naive(documents: list[list[int]], length: int, max_sequences: int) -> list[tuple]:
    """Write every token down with its document, then cut."""
    stream = [(t, d) for d, doc in enumerate(documents) for t in [*doc, EOS]]
    sequences = []
    for start in range(0, len(stream) - length + 1, length):
        part = stream[start : start + length]
        owners = [d for _, d in part]
        ids = list(dict.fromkeys(owners))
        sequences.append(([t for t, _ in part], ids, [owners.index(d) for d in ids]))
    return sequences[:max_sequences]


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12),
    length=st.integers(1, 7),
    max_sequences=st.integers(1, 8),
    take_often=st.booleans(),
)
def test_packing_equals_naive(
    documents: list[list[int]], length: int, max_sequences: int, take_often: bool
) -> None:
    packer = SequencePacker(length, max_sequences, [EOS])
    out: list[PackedSequence] = []
    kept = 0
    for number, document in enumerate(documents):
        was_full = packer.full
        taken = packer.add(number, "s", document)
        assert taken <= len(document)
        assert not (was_full and taken)
        kept += taken
        if take_often:
            out += packer.take()
    out += packer.take()
    got = [(s.input_ids.tolist(), s.doc_ids, s.doc_starts) for s in out]
    assert got == naive(documents, length, max_sequences)
    assert kept <= length * max_sequences
    assert packer.full == (sum(len(d) + 1 for d in documents) >= length * max_sequences)


def test_source_is_that_of_the_first_document() -> None:
    packer = SequencePacker(4, 10, [EOS])
    packer.add(0, "a", [1, 2])
    packer.add(1, "b", [3, 4, 5, 6])
    assert [s.source for s in packer.take()] == ["a", "b"]


FRONT = [99]


def naive_with_front(
    documents: list[list[int]], length: int, max_sequences: int, end: list[int]
) -> list[tuple]:
    """Token by token: every document and every sequence begins with what is in front."""
    rows: list[list[tuple[int, int]]] = [[]]
    for number, document in enumerate(documents):
        for token in [*FRONT, *document, *end]:
            if len(rows[-1]) == length:
                rows.append([])
            if not rows[-1] and token != FRONT[0]:
                rows[-1] += [(extra, number) for extra in FRONT]
            rows[-1].append((token, number))
    out = []
    for row in rows:
        if len(row) == length:
            owners = [d for _, d in row]
            ids = list(dict.fromkeys(owners))
            out.append(([t for t, _ in row], ids, [owners.index(d) for d in ids]))
    return out[:max_sequences]


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12),
    length=st.integers(2, 7),
    max_sequences=st.integers(1, 8),
    end=st.sampled_from([[], [EOS]]),
)
def test_every_document_and_every_sequence_begins_with_what_is_in_front(
    documents: list[list[int]], length: int, max_sequences: int, end: list[int]
) -> None:
    packer = SequencePacker(length, max_sequences, end, FRONT)
    for number, document in enumerate(documents):
        assert packer.add(number, "s", document) <= len(document) + len(FRONT)
    got = [(s.input_ids.tolist(), s.doc_ids, s.doc_starts) for s in packer.take()]
    assert got == naive_with_front(documents, length, max_sequences, end)
    assert all(row[0] == FRONT[0] for row, _, _ in got)
    assert packer.full == (len(got) == max_sequences)
