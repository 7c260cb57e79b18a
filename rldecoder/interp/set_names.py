"""A name for a set of tokens: a class or an affix where one covers it, else its first tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from rldecoder.interp.vocabulary import Vocabulary, visible

COVERED = 0.8
"""Share of a set's tokens, and of their weight, that a class or an affix must hold."""
MIN_MEMBERS = 4
"""Tokens of a set, at least, that are named by a class or an affix."""
AFFIX_LENGTHS = (5, 4, 3, 2)
SHOWN = 6
"""Tokens that a label names."""

# A token belongs to a union of groups if each of its characters does.
_CHARACTERS = {
    "closing brackets": ")]}>",
    "opening brackets": "([{<",
    "quotes": "\"'`“”‘’«»",
    "sentence ends": ".!?…",
    "commas, colons and semicolons": ",;:",
    "dashes and underscores": "-–—_",
    "operators": "=+*/%&|^~<>",
}
_KINDS: dict[str, Callable[[str], bool]] = {
    "a digit": lambda text: len(text.strip()) == 1 and text.strip().isdigit(),
    "a number": lambda text: text.strip().isdigit(),
    "a line break": lambda text: text.isspace() and "\n" in text,
    "indentation": lambda text: text.isspace() and "\n" not in text,
    "words in capitals": lambda text: text.strip().isupper() and len(text.strip()) > 1,
    "capitalised words": lambda text: (
        text.strip().isalpha() and text.strip()[0].isupper() and len(text.strip()) > 1
    ),
    "letters that are not Latin": lambda text: text.strip().isalpha() and not text.isascii(),
    "pieces that continue a word": lambda text: text.isalpha() and text.islower(),
}


def name_set(tokens: Sequence[int], weights: Sequence[float], vocabulary: Vocabulary) -> str | None:
    """What covers a set, in words; None if nothing does.

    Args:
        weights: of the tokens, none negative.
    """
    texts = [vocabulary.texts[token] for token in tokens]

    def covers(holds: Callable[[str], bool], least: int = MIN_MEMBERS) -> bool:
        held = [weight for text, weight in zip(texts, weights, strict=True) if holds(text)]
        enough = len(held) >= max(least, COVERED * len(texts))
        return enough and sum(held) >= COVERED * sum(weights)

    # One group of characters, or two: "closing brackets and quotes".
    groups = list(_CHARACTERS.items())
    pairs = [(a, b) for i, a in enumerate(groups) for b in groups[i + 1 :]]
    for union in (*((group,) for group in groups), *pairs):
        allowed = "".join(characters for _, characters in union)
        if covers(partial(_made_of, allowed=allowed), 2) and all(
            any(set(text.strip()) & set(characters) for text in texts) for _, characters in union
        ):
            return " and ".join(name for name, _ in union)
    for name in ("a digit", "a number", "a line break", "indentation"):
        if covers(_KINDS[name], 2):
            return name
    affix = _affix(texts, covers)
    if affix is not None:
        return affix
    # What is left holds of many tokens: it must hold of all.
    for name, holds in list(_KINDS.items())[4:]:
        if len(texts) >= MIN_MEMBERS and all(map(holds, texts)):
            return name
    return None


def show_set(tokens: Sequence[int], vocabulary: Vocabulary, count: int = SHOWN) -> str:
    """The first tokens of a set, those that differ by case or a leading space once.

    >>> show_set([4, 2], Vocabulary(["a", "b", " the", "c", "\\n"]))
    '"\\\\n", "the"'
    """
    shown: dict[str, str] = {}
    for token in tokens:
        text = vocabulary.texts[token]
        word = text.strip() or text
        shown.setdefault(word.lower(), visible(word))
    first = list(shown.values())[:count]
    more = ", …" if len(shown) > count else ""
    return ", ".join(f'"{word}"' for word in first) + more


def _made_of(text: str, allowed: str) -> bool:
    word = text.strip()
    return bool(word) and all(character in allowed for character in word)


def _has_part(text: str, part: Callable[[str], str], wanted: str) -> bool:
    return part(text.strip().lower()) == wanted


def _affix(texts: Sequence[str], covers: Callable[[Callable[[str], bool]], bool]) -> str | None:
    """The longest beginning or end that covers the set's words, none of which it is itself."""
    words = [text.strip().lower() for text in texts]
    for length in AFFIX_LENGTHS:
        for side, part, words_that in (
            ("suffix", lambda word, n=length: word[-n:], "words that end in"),
            ("prefix", lambda word, n=length: word[:n], "words that begin with"),
        ):
            found = Counter(part(word) for word in set(words) if len(word) > length)
            if not found:
                continue
            best, number = found.most_common(1)[0]
            if number < MIN_MEMBERS or not best.isalpha():
                continue
            if covers(partial(_has_part, part=part, wanted=best)):
                shown = f"-{best}" if side == "suffix" else f"{best}-"
                return f'{words_that} "{visible(shown)}"'
    return None
