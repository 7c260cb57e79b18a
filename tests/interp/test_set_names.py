"""Names of token sets."""

from __future__ import annotations

import pytest

from rldecoder.interp.set_names import name_set, show_set
from rldecoder.interp.vocabulary import Vocabulary


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        ([" quickly", " clearly", " fully", " rarely"], 'words that end in "-ly"'),
        ([" unfair", " undo", " unlike", "unseen", " odd"], 'words that begin with "un-"'),
        (["1", " 2", "7"], "a digit"),
        (["10", " 2", "77"], "a number"),
        ([")", "]", '")', "'"], "closing brackets and quotes"),
        ([")", "]", "))"], "closing brackets"),
        (['"', " '", "``"], "quotes"),
        (["\n", "\n\n", " \n"], "a line break"),
        (["    ", "        "], "indentation"),
        ([" Anna", " Berlin", "Otto", " Paris"], "capitalised words"),
        (["ing", "ed", "er", "s"], "pieces that continue a word"),
        ([" the", " you", " it", " we"], None),
        # One word in several forms is no affix.
        ([" cache", "cache", " Cache", "Cache"], None),
        # An affix of half the set does not cover it.
        ([" quickly", " clearly", " fully", " rarely", " dog", " cat"], None),
    ],
)
def test_a_class_or_affix_that_covers_the_set(texts: list[str], name: str | None) -> None:
    tokens = range(len(texts))
    assert name_set(tokens, [1.0] * len(texts), Vocabulary(texts)) == name


def test_weight_counts_as_well_as_number() -> None:
    texts = [" dog", " quickly", " clearly", " fully", " rarely"]
    assert name_set(range(5), [1.0] * 5, Vocabulary(texts)) == 'words that end in "-ly"'
    assert name_set(range(5), [9.0, 1, 1, 1, 1], Vocabulary(texts)) is None


def test_forms_of_a_word_are_shown_once() -> None:
    vocabulary = Vocabulary([" the", "The", " a", "\n", "x\u202e", "    "])
    assert show_set(range(6), vocabulary) == '"the", "a", "\\n", "x\\u202e", "    "'
    assert show_set(range(6), vocabulary, 2) == '"the", "a", …'
