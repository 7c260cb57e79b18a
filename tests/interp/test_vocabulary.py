from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rldecoder.interp.vocabulary import TOKEN_CLASSES, Side, Vocabulary, visible

TEXTS = [" the", "ing", "Ed", " RUN", "12", "\n", " .", "{", "é", "", "<s>"]
EXPECTED = {
    "number": {4},
    "lowercase": {0, 1, 8},
    "uppercase": {3},
    "capitalised": {2, 3},
    "letters": {0, 1, 2, 3, 8},
    "punctuation": {6, 7},
    "whitespace": {5},
    "newline": {5},
    "code_symbol": {7},
    "non_ascii": {8},
    "word_start": {0, 3},
    "word_piece": {1, 2, 8},
    "special": {10},
}


@pytest.mark.parametrize("name", sorted(TOKEN_CLASSES))
def test_classes(name: str) -> None:
    table = Vocabulary(TEXTS, special_ids=[10]).class_table(name)
    assert set(table.nonzero()[0].tolist()) == EXPECTED[name]
    assert table.size == len(TEXTS) + 1
    assert not table[-1]


def test_affixes_are_shorter_than_the_word_and_lower_case() -> None:
    vocabulary = Vocabulary([" Walks", "a", "12", "do"])
    assert vocabulary.affixes(0, 2) == [
        ("prefix", "w"),
        ("prefix", "wa"),
        ("suffix", "s"),
        ("suffix", "ks"),
    ]
    assert vocabulary.affixes(1, 4) == []
    assert vocabulary.affixes(2, 4) == []
    assert vocabulary.affixes(3, 4) == [("prefix", "d"), ("suffix", "o")]
    assert vocabulary.affix_table("suffix", "ks")[:-1].tolist() == [True, False, False, False]


@given(
    st.lists(st.text("abAB ", max_size=4), max_size=12),
    st.text("ab", min_size=1, max_size=3),
    st.sampled_from(["prefix", "suffix"]),
)
def test_affix_tables_equal_a_naive_search(words: list[str], text: str, side: Side) -> None:
    table = Vocabulary(words).affix_table(side, text)
    method = "startswith" if side == "prefix" else "endswith"
    assert table.tolist() == [getattr(w.strip().lower(), method)(text) for w in words] + [False]


def test_texts_of_a_byte_level_tokenizer_join_to_the_text(tiny_lm_dir: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, 600)
    assert vocabulary.size == 600
    assert vocabulary.texts[599] == ""
    text = "The list is sorted in place, using only < comparisons."
    assert "".join(vocabulary.texts[i] for i in tokenizer(text)["input_ids"]) == text
    assert vocabulary.class_table("special")[tokenizer.eos_token_id]


def test_invisible_characters_become_visible() -> None:
    assert visible("a\n\t\u202eb\u200b") == "a\\n\\t\\u202eb\\u200b"
    assert Vocabulary(["\u2066x"]).show(0) == '"\\u2066x"'
    assert Vocabulary(["x"]).show(7) == "?"
