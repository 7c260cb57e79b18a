"""What each token looks like: its text, and the classes that predicates can name."""

from __future__ import annotations

import string
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from rldecoder.visible_text import HIDDEN_CATEGORIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BoolArray = NDArray[np.bool_]
Side = Literal["prefix", "suffix"]
CODE_SYMBOLS = frozenset("{}[]()<>=_;/\\|&^%$#@`~*+")

TOKEN_CLASSES: dict[str, str] = {
    "number": "is a number",
    "lowercase": "is in lower case",
    "uppercase": "is in upper case",
    "capitalised": "starts with a capital letter",
    "letters": "is made of letters",
    "punctuation": "is punctuation",
    "whitespace": "is white space",
    "newline": "contains a line break",
    "code_symbol": "contains a code symbol",
    "non_ascii": "contains a non-ASCII character",
    "word_start": "starts a word (leading space)",
    "word_piece": "continues a word (letters, no leading space)",
    "special": "is a special token",
}
"""Class name -> how a label says it."""


class Vocabulary:
    """Texts of all token ids of a model, and boolean tables over them.

    Every table has one more entry than there are tokens: the last one, False, is what the
    index UNKNOWN (-1) reads.
    """

    def __init__(self, texts: Sequence[str], special_ids: Sequence[int] = ()) -> None:
        self.texts = tuple(texts)
        self.size = len(self.texts)
        self._words = tuple(text.strip().lower() for text in self.texts)
        special = np.zeros(self.size, bool)
        special[list(special_ids)] = True
        self._special = special
        self._class_tables = {name: self._classify(name) for name in TOKEN_CLASSES}
        opened = [sum(text.count(c) for c in "([{") for text in self.texts]
        closed = [sum(text.count(c) for c in ")]}") for text in self.texts]
        self.brackets = np.array([*np.subtract(opened, closed).tolist(), 0], np.int64)
        """[V + 1] brackets that a token opens, less those that it closes."""
        self.blank_line = np.array([*("\n\n" in text for text in self.texts), False])
        """[V + 1] whether a token contains an empty line."""
        # Words with a common affix are neighbours when sorted (from the end for suffixes).
        self._sorted: dict[Side, tuple[list[str], NDArray[np.int64]]] = {
            "prefix": _sorted_words(self._words),
            "suffix": _sorted_words(tuple(word[::-1] for word in self._words)),
        }

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Vocabulary:
        """Texts of ids 0..vocab_size-1; ids that the tokenizer does not know become empty."""
        known = min(len(tokenizer), vocab_size)
        pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
        decoded = tokenizer.batch_decode(
            [[i] for i in range(known)], clean_up_tokenization_spaces=False
        )
        # SentencePiece decoders drop a leading space; its mark on the piece still shows it.
        texts = [
            piece.replace("▁", " ") if piece is not None and piece.startswith("▁") else text
            for piece, text in zip(pieces, decoded, strict=True)
        ]
        special = [i for i in tokenizer.all_special_ids if i < vocab_size]
        return cls(texts + [""] * (vocab_size - known), special)

    def class_table(self, name: str) -> BoolArray:
        """[V + 1] which tokens belong to a class of TOKEN_CLASSES."""
        return self._class_tables[name]

    def affix_table(self, side: Side, text: str) -> BoolArray:
        """[V + 1] whose text, stripped and in lower case, starts ("prefix") or ends with `text`."""
        if side == "suffix":
            text = text[::-1]
        words, ids = self._sorted[side]

        def start(word: str) -> str:
            return word[: len(text)]

        low, high = bisect_left(words, text, key=start), bisect_right(words, text, key=start)
        table = np.zeros(self.size + 1, bool)
        table[ids[low:high]] = True
        return table

    def token_table(self, tokens: Sequence[int]) -> BoolArray:
        """[V + 1] whether a token is one of `tokens`."""
        table = np.zeros(self.size + 1, bool)
        table[list(tokens)] = True
        return table

    def affixes(self, token: int, max_length: int) -> list[tuple[Side, str]]:
        """(side, text) of a token's affixes, shorter than its word; none if it is no word.

        Only words longer than the affix count, so that an affix says more than a token does.
        """
        word = self._words[token]
        if not word.isalpha():
            return []
        lengths = range(1, min(max_length, len(word) - 1) + 1)
        prefixes: list[tuple[Side, str]] = [("prefix", word[:n]) for n in lengths]
        return prefixes + [("suffix", word[-n:]) for n in lengths]

    def show(self, token: int) -> str:
        """A token's text in quotes, with control, bidi and zero-width characters made visible."""
        return f'"{visible(self.texts[token])}"' if 0 <= token < self.size else "?"

    def _classify(self, name: str) -> BoolArray:
        table = np.zeros(self.size + 1, bool)
        if name == "special":
            table[:-1] = self._special
            return table
        check = _CHECKS[name]
        table[:-1] = [bool(text) and check(text) for text in self.texts]
        table[:-1] &= ~self._special
        return table


def _sorted_words(words: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The words in order, and the index that each had."""
    order = sorted(range(len(words)), key=words.__getitem__)
    return [words[i] for i in order], np.array(order, np.int64)


def visible(text: str) -> str:
    """Text in which no character is invisible: line breaks, controls, bidi marks are escaped."""
    if text.isprintable():  # almost every token; it knows of the same categories
        return text
    out = []
    for char in text:
        if char == "\n":
            out.append("\\n")
        elif char == "\t":
            out.append("\\t")
        elif unicodedata.category(char) in HIDDEN_CATEGORIES:
            out.append(f"\\u{ord(char):04x}")
        else:
            out.append(char)
    return "".join(out)


_CHECKS: dict[str, Callable[[str], bool]] = {
    "number": lambda text: text.strip().isdigit(),
    "lowercase": lambda text: text.strip().islower(),
    "uppercase": lambda text: text.strip().isupper(),
    "capitalised": lambda text: text.strip()[:1].isupper(),
    "letters": lambda text: text.strip().isalpha(),
    "punctuation": lambda text: (
        all(c in string.punctuation for c in text.strip()) and bool(text.strip())
    ),
    "whitespace": str.isspace,
    "newline": lambda text: "\n" in text,
    "code_symbol": lambda text: any(c in CODE_SYMBOLS for c in text),
    "non_ascii": lambda text: not text.isascii(),
    "word_start": lambda text: text[0] == " " and text.strip().isalpha(),
    "word_piece": str.isalpha,
}
