from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rldecoder.interp.predicate import (
    Affix,
    And,
    NgramIn,
    Not,
    Or,
    PositionRange,
    Predicate,
    TextState,
    TokenClass,
    TokenIn,
    conjunction,
    describe,
    disjunction,
    evaluate,
    num_atoms,
)
from rldecoder.interp.text_state import TEXT_STATES
from rldecoder.interp.vocabulary import CODE_SYMBOLS, TOKEN_CLASSES, Vocabulary

TEXTS = [" the", " cat", "ing", "Ed", " RUN", "12", "\n", ".", "{", "é", " walking", "", "\u202e"]
TEXTS += ["(", "])", " \n\n"]
SPECIAL = 11
JSON: TypeAdapter[Any] = TypeAdapter(Predicate)
VOCABULARY = Vocabulary(TEXTS, special_ids=[SPECIAL])

token = st.integers(0, len(TEXTS) - 1)
offset = st.integers(-3, 0)


def ngrams(length: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    one = st.lists(token, min_size=length, max_size=length).map(tuple)
    return st.lists(one, min_size=1, max_size=4).map(tuple)


atoms = st.one_of(
    st.builds(TokenIn, tokens=st.lists(token, min_size=1, max_size=4).map(tuple), offset=offset),
    st.builds(NgramIn, ngrams=st.integers(2, 3).flatmap(ngrams)),
    st.builds(
        Affix,
        side=st.sampled_from(["prefix", "suffix"]),
        text=st.text("abcdginrtw", min_size=1, max_size=2),
        offset=offset,
    ),
    st.builds(TokenClass, name=st.sampled_from(sorted(TOKEN_CLASSES)), offset=offset),
    st.builds(TextState, name=st.sampled_from(sorted(TEXT_STATES))),
    st.builds(PositionRange, low=st.integers(0, 3), high=st.integers(1, 8)),
)
predicates = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(Not, part=inner),
        st.builds(And, parts=st.lists(inner, min_size=2, max_size=3).map(tuple)),
        st.builds(Or, parts=st.lists(inner, min_size=2, max_size=3).map(tuple)),
    ),
    max_leaves=5,
)
grids = st.integers(1, 12).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(-1, len(TEXTS) - 1), min_size=width, max_size=width),
        min_size=1,
        max_size=3,
    )
)


def naive_state(name: str, seen: list[int]) -> bool:
    """A state after the tokens `seen`, read one by one."""
    texts = ["" if index < 0 else TEXTS[index] for index in seen]
    if name == "plain":
        return not any(set(text) & CODE_SYMBOLS for text in texts[-8:])
    if name == "first_seen":
        ends = [at for at, index in enumerate(seen) if index == SPECIAL]
        return seen[-1] not in seen[ends[-1] if ends else 0 : -1]
    depth = 0
    for at, text in enumerate(texts):
        empty_line = "\n" in text and at > 0 and "\n" in texts[at - 1]
        if seen[at] == SPECIAL or "\n\n" in text or empty_line:
            depth = 0
            continue
        opened = sum(text.count(bracket) for bracket in "([{")
        depth = max(0, depth + opened - sum(text.count(bracket) for bracket in ")]}"))
    return depth > 0


def naive(predicate: Predicate, row: list[int], at: int) -> bool:
    """What a predicate means, cell by cell."""

    def look(offset: int) -> int:
        return row[at + offset] if at + offset >= 0 else -1

    match predicate:
        case TokenIn():
            return look(predicate.offset) in predicate.tokens
        case NgramIn():
            n = len(predicate.ngrams[0])
            return at + 1 >= n and tuple(row[at + 1 - n : at + 1]) in predicate.ngrams
        case Affix():
            index = look(predicate.offset)
            if index < 0:
                return False
            word = TEXTS[index].strip().lower()
            if predicate.side == "prefix":
                return word.startswith(predicate.text)
            return word.endswith(predicate.text)
        case TokenClass():
            index = look(predicate.offset)
            return index >= 0 and bool(VOCABULARY.class_table(predicate.name)[index])
        case PositionRange():
            return predicate.low <= at < predicate.high
        case TextState():
            return row[at] >= 0 and naive_state(predicate.name, row[: at + 1])
        case Not():
            return not naive(predicate.part, row, at)
        case And():
            return all(naive(part, row, at) for part in predicate.parts)
        case Or():
            return any(naive(part, row, at) for part in predicate.parts)


@given(predicates)
def test_json_round_trip(predicate: Predicate) -> None:
    assert JSON.validate_json(JSON.dump_json(predicate)) == predicate


@given(predicates, grids)
def test_evaluation_equals_a_naive_reading(predicate: Predicate, grid: list[list[int]]) -> None:
    found = evaluate(predicate, np.array(grid), VOCABULARY)
    expected = [[naive(predicate, row, at) for at in range(len(row))] for row in grid]
    assert found.tolist() == expected


@given(predicates)
def test_text_has_no_invisible_character(predicate: Predicate) -> None:
    text = describe(predicate, VOCABULARY)
    assert text
    assert text.isprintable()


@given(predicates, grids)
def test_no_predicate_looks_ahead(predicate: Predicate, grid: list[list[int]]) -> None:
    tokens = np.array(grid)
    full = evaluate(predicate, tokens, VOCABULARY)
    cut = evaluate(predicate, tokens[:, :-1], VOCABULARY)
    assert (full[:, :-1] == cut).all()


@pytest.mark.parametrize(
    ("predicate", "text"),
    [
        (TokenIn(tokens=(0, 1)), 'token is " the" or " cat"'),
        (TokenIn(tokens=tuple(range(10)), offset=-1), "and 2 more"),
        (Affix(side="suffix", text="ing"), 'token ends with "ing"'),
        (TokenClass(name="number", offset=-1), "previous token is a number"),
        (NgramIn(ngrams=((0, 1),)), 'text ends with " the cat"'),
        (PositionRange(low=0, high=3), "position is 0 to 2"),
        (TextState(name="in_bracket"), "a bracket is open"),
    ],
)
def test_text(predicate: Predicate, text: str) -> None:
    assert text in describe(predicate, VOCABULARY)


def test_joining_flattens_one_level_and_counts_atoms() -> None:
    a, b, c = TokenIn(tokens=(1,)), TokenIn(tokens=(2,)), TokenClass(name="number")
    both = conjunction(conjunction(a, b), c)
    assert both == And(parts=(a, b, c))
    mixed = disjunction(both, a)
    assert mixed == Or(parts=(both, a))
    assert num_atoms(Not(part=mixed)) == 4
    assert describe(mixed, VOCABULARY).startswith("(")


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "token_in", "tokens": []},
        {"kind": "token_in", "tokens": [1], "offset": 1},
        {"kind": "token_in", "tokens": [-4]},
        {"kind": "ngram_in", "ngrams": [[1, 2], [1, 2, 3]]},
        {"kind": "ngram_in", "ngrams": [[1]]},
        {"kind": "token_class", "name": "rhymes"},
        {"kind": "text_state", "name": "raining"},
        {"kind": "and", "parts": [{"kind": "token_in", "tokens": [1]}]},
        {"kind": "code", "text": "import os"},
        {"kind": "affix", "side": "prefix", "text": "a", "more": 1},
    ],
)
def test_what_is_no_predicate_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JSON.validate_python(bad)
