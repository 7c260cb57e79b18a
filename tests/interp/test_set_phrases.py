"""Phrases for sets of words, by the real MiniLM of the installed package."""

from __future__ import annotations

import numpy as np
import pytest

from rldecoder.interp.assembly import output_words
from rldecoder.interp.output_sets import OutputSet
from rldecoder.interp.set_phrases import PHRASES, name_words
from rldecoder.interp.vocabulary import Vocabulary

HELD_OUT = {
    "colours": "pink violet crimson scarlet",
    "family": "niece nephew husband wife",
    "animals": "tiger rabbit goat bear",
    "plants": "oak fern daisy shrub",
    "food": "potato sausage butter pie",
    "drinks": "lemonade whiskey ale cider",
    "clothes": "scarf sweater gown sock",
    "furniture": "couch stool wardrobe armchair",
    "vehicles": "van lorry tram yacht",
    "countries": "Mexico Egypt Canada Poland",
    "cities": "Dublin Amsterdam Prague Seattle",
    "first names": "Henry Margaret Peter Susan",
    "verbs of saying": "muttered exclaimed remarked murmured",
    "verbs of moving": "jog wander crawl march",
    "parts of the body": "knee elbow shoulder chest",
    "weather": "hail rainfall blizzard drizzle",
    "materials": "copper bronze plastic marble",
    "sports": "hockey rugby basketball golf",
    "music": "guitar orchestra trumpet symphony",
    "law and crime": "attorney defendant robbery jury",
    "illness": "influenza measles asthma tumour",
    "money and trade": "currency revenue merchant income",
    "moods": "cheerful miserable furious delighted",
    "units of measure": "centimetre yard ounce acre",
}


@pytest.fixture(scope="module")
def named() -> dict[str, str | None]:
    texts = [[f" {word}" for word in listed.split()] for listed in HELD_OUT.values()]
    return dict(zip(HELD_OUT, name_words(texts), strict=True))


def test_words_that_no_phrase_lists_are_named_rightly_or_not_at_all(
    named: dict[str, str | None],
) -> None:
    listed = {word.lower() for words in PHRASES.values() for word in words.split()}
    new = [w for words in HELD_OUT.values() for w in words.lower().split() if w not in listed]
    assert len(new) > 0.95 * 4 * len(HELD_OUT)
    wrong = {phrase: said for phrase, said in named.items() if said not in (None, phrase)}
    right = [phrase for phrase, said in named.items() if said == phrase]
    assert len(wrong) <= 1, wrong
    assert len(right) >= 0.7 * len(HELD_OUT), named


def test_words_of_many_phrases_have_none() -> None:
    rng = np.random.default_rng(0)
    words = [listed.split() for listed in PHRASES.values()]
    mixed = [
        [words[group][0] for group in rng.choice(len(words), 6, replace=False)] for _ in range(40)
    ]
    assert sum(said is not None for said in name_words(mixed)) <= 1


def test_what_is_no_word_is_named_by_nobody() -> None:
    few = [[" red", "blue", "Red"], [" red", "blue", "green", ")", "(", "7", "_x", "\n"], []]
    assert name_words(few) == [None, None, None]


def test_a_phrase_says_whose_it_is_and_gives_way_to_a_class() -> None:
    vocabulary = Vocabulary([" red", " blue", " pink", " green", "1", "7"])
    held = OutputSet((0, 1, 2, 3), (1.0,) * 4, (), (), 9, 9, None)
    assert output_words(held, vocabulary, "colours") == (
        "colours (by MiniLM)", 'raises colours (by MiniLM): "red", "blue", "pink", "green"',
    )  # fmt: skip
    assert output_words(held, vocabulary, None) == (None, 'raises "red", "blue", "pink", "green"')
    digits = held._replace(tokens=(4, 5), gains=(1.0, 1.0))
    assert output_words(digits, vocabulary, "colours")[0] == "a digit"
    failed = held._replace(tokens=(), gains=(), failure="rare")
    assert output_words(failed, vocabulary, "colours") == (None, None)
