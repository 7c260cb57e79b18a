"""What a label of somebody else says, where that leaves no doubt: tokens, or their ends.

"The words 'cat' and 'dog'" and "words ending in 'ing'" are tokens on which a latent fires, `say
"cat"` tokens that it makes the model say. Everything else is in free words, and not read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal, NamedTuple

from rldecoder.interp.predicate import Affix, NgramIn, Predicate, TokenIn, disjunction
from rldecoder.interp.vocabulary import Vocabulary

Form = Literal["token", "prefix", "suffix"]
Encode = Callable[[str], Sequence[int]]
"""A text's own tokens, without any around it."""

_QUOTED = re.compile(
    r'"([^"]{1,60})"|“([^”]{1,60})”|`([^`]{1,60})`|‘([^’]{1,60})’|«([^»]{1,60})»'
    r"|(?<!\w)'((?:[^']|'(?=\w)){1,60})'(?!\w)"
)
_SAY = re.compile(r"^\s*(?:say|says|saying|predicts?|predicting|outputs?)\b", re.IGNORECASE)
# Words that may stand around the quotes of a mere list.
_LISTING = frozenset(
    {"a", "an", "and", "or", "of", "the", "this", "these", "is", "are", "exact", "exactly",
     "word", "words", "token", "tokens", "term", "terms", "phrase", "phrases", "string", "strings",
     "character", "characters", "letter", "letters", "symbol", "symbols", "text", "subword",
     "subwords", "fragment", "fragments", "occurrence", "occurrences", "instance", "instances",
     "mention", "mentions", "appearance", "appearances"}
)  # fmt: skip
_AFFIX = re.compile(
    r"\b(?:(suffix(?:es)?|end(?:s|ing)? (?:in|with))"
    r"|(?:prefix(?:es)?|(?:start|begin)(?:s|n?ing)? with))\b",
    re.IGNORECASE,
)
FREE = "in free words"
_MOST = 64
"""Quoted texts of one explanation that are read."""


class Reading(NamedTuple):
    """What the deterministic reader makes of an explanation."""

    kind: Literal["input", "output"] | None
    """Tokens on which it fires, tokens that it makes the model say, or not to be read."""
    texts: tuple[str, ...]
    """The tokens, as they are quoted."""
    why_not: str | None
    """Why there is no reading."""
    form: Form = "token"
    """What the texts are: tokens, or what tokens begin or end with."""


def read_label(text: str) -> Reading:
    """Read an explanation, if it does nothing but list tokens."""
    quoted = [next(part for part in found if part) for found in _QUOTED.findall(text)]
    if not quoted:
        return Reading(None, (), FREE)
    if len(quoted) > _MOST:
        return Reading(None, (), "too many tokens")
    says = _SAY.match(text)
    rest = _QUOTED.sub(" ", text[says.end() :] if says else text)

    # What tokens begin or end with, said once, and of what fires alone.
    forms: list[Form] = ["suffix" if found[1] else "prefix" for found in _AFFIX.finditer(rest)]
    if len(forms) > 1 or (forms and says):
        return Reading(None, (), FREE)
    words = set(re.findall(r"\w+", _AFFIX.sub(" ", rest).lower()))
    if not words <= (_LISTING | {"that", "which"} if forms else _LISTING):
        return Reading(None, (), FREE)
    kind: Literal["input", "output"] = "output" if says else "input"
    return Reading(kind, tuple(dict.fromkeys(quoted)), None, forms[0] if forms else "token")


class TokenReader:
    """Quoted texts to predicates, where one of them has just been read, and to sets of tokens.

    A text that is a token of its own, in any case, with a space in front or not, stands for that
    token; another one for the tokens that spell it. Spaces and line breaks mean themselves.
    """

    def __init__(self, vocabulary: Vocabulary, encode: Encode) -> None:
        self._encode = encode
        self._texts = vocabulary.texts
        self._tokens: dict[str, list[int]] = {}
        for token, text in enumerate(vocabulary.texts):
            self._tokens.setdefault(_word(text), []).append(token)

    def predicate(self, texts: Sequence[str], form: Form = "token") -> Predicate | None:
        """None where no text can be written with tokens."""
        if form != "token":
            ends = dict.fromkeys(_word(text).strip("-") for text in texts)
            affixes: list[Predicate] = [Affix(side=form, text=end) for end in ends if end.strip()]
            return reduce(disjunction, affixes) if affixes else None
        tokens: set[int] = set()
        ngrams: set[tuple[int, ...]] = set()
        for text in texts:
            found = self._tokens.get(_word(text), [])
            tokens.update(found)
            if not found:
                ngrams |= self._spelled(text.strip())
        parts: list[Predicate] = [TokenIn(tokens=tuple(tokens))] if tokens else []
        for length in sorted({len(ngram) for ngram in ngrams}):
            parts.append(NgramIn(ngrams=tuple(n for n in ngrams if len(n) == length)))
        return reduce(disjunction, parts) if parts else None

    def starts(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of the tokens that a model says first when it says one of the texts.

        A text that is no token of its own stands for the first token of its spelling, with a space
        in front and without: no more is said in one step. Empty where no text can be written.
        """
        tokens: set[int] = set()
        for text in texts:
            found = self._tokens.get(_word(text), [])
            tokens.update(found or self._first(text.strip()))
        return tuple(sorted(tokens))

    def _first(self, text: str) -> set[int]:
        ways = [self._encode(spelled) for spelled in (text, f" {text}")] if text else []
        # A space that is a token of its own begins every word.
        words = ([int(token) for token in way if self._word_at(int(token))] for way in ways)
        return {way[0] for way in words if way}

    def _word_at(self, token: int) -> bool:
        return token < len(self._texts) and bool(self._texts[token].strip())

    def _spelled(self, text: str) -> set[tuple[int, ...]]:
        """Token ids of a text that is no single token, as it is and as it may begin a sentence."""
        forms = {text, text.lower(), text.capitalize()} if text else set()
        ways = {
            tuple(int(token) for token in self._encode(spelled))
            for form in forms
            for spelled in (form, f" {form}")
        }
        return {ids for ids in ways if len(ids) >= 2}


def _word(text: str) -> str:
    return text.strip().lower() if text.strip() else text
