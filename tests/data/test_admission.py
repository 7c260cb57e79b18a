"""Which documents are let through: length, room, duplicates, and the rest of long ones."""

from __future__ import annotations

from collections.abc import Iterator

from rldecoder.config.data import IngestConfig
from rldecoder.data.admission import Admission
from rldecoder.data.deduplicate import fingerprint
from rldecoder.data.documents import Candidate, Document
from rldecoder.data.packing import SequencePacker
from rldecoder.data.text_shards import Item, ReadyText

CONFIG = IngestConfig(min_document_chars=8, max_document_chars=40)
LINES = [f"line {n} of a text {chr(97 + n) * 5}" for n in range(6)]
LONG = "\n".join(LINES)


def packers(*names: str) -> dict[str, SequencePacker]:
    return {name: SequencePacker(4, 2, [0]) for name in names}


def ready(items: Iterator[Item]) -> Iterator[tuple[Item, ReadyText]]:
    return ((item, ReadyText([1] * len(item.text), fingerprint(item.text))) for item in items)


def candidates(texts: dict[str, str | None], *, users: bool = False) -> Iterator[Candidate]:
    for key, text in texts.items():
        document = None if text is None else Document(key, key, "source", "unknown", text)
        yield Candidate(key, lambda document=document: document, users)


def test_what_is_left_out_is_counted_by_reason() -> None:
    admission = Admission(packers("train"), CONFIG, ready)
    texts = {"empty": None, "short": "abc", "good": "a text of its own", "other": "for nobody"}
    let_in = list(
        admission.beginnings(
            candidates(texts), lambda key: "elsewhere" if key == "other" else "train"
        )
    )
    assert [(one.split, one.document.title) for one in let_in] == [("train", "good")]
    assert admission.dropped == {"no_text": 1, "too_short": 1}


def test_a_document_that_no_split_has_room_for_is_not_even_read() -> None:
    rooms = packers("train")
    rooms["train"].add(0, "source", range(1, 20))
    admission = Admission(rooms, CONFIG, ready)

    def never() -> Document:
        raise AssertionError("it was read")

    assert not list(admission.beginnings(iter([Candidate("x", never)]), lambda key: "train"))


def test_the_same_text_is_in_one_split_only() -> None:
    admission = Admission(packers("train", "test"), CONFIG, ready)
    texts = {"train": "the very same text", "test": "the very same text"}
    assert [one.split for one in admission.beginnings(candidates(texts), str)] == ["train"]
    assert sum(admission.dropped.values()) == 1
    assert "duplicates_across_splits" in next(iter(admission.dropped))


def test_the_rest_of_a_users_document_comes_in_parts() -> None:
    admission = Admission(packers("train"), CONFIG, ready)
    (first,) = admission.beginnings(candidates({"a": LONG}, users=True), lambda key: "train")
    assert admission.has_more
    rests = [
        one.document
        for one in admission.rests(candidates({"a": LONG}, users=True), lambda key: "train")
    ]
    assert "\n".join([first.document.text, *(rest.text for rest in rests)]) == LONG
    assert [rest.title for rest in rests][:1] == ["a (part 2)"]
    assert admission.continued == 1
    assert not admission.has_more


def test_documentation_is_not_read_on() -> None:
    admission = Admission(packers("train"), CONFIG, ready)
    assert list(admission.beginnings(candidates({"a": LONG}), lambda key: "train"))
    assert not list(admission.rests(candidates({"a": LONG}), lambda key: "train"))
