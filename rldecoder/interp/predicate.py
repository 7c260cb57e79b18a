"""Executable predicates: what a deterministic label says, in a form that runs.

A predicate is a small frozen tree. It has a JSON form (pydantic), a text for people, and an exact
meaning: `evaluate` returns, for every cell of a token grid, whether the predicate holds there.
No predicate looks ahead: a latent at position t has read nothing beyond t.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, assert_never

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from rldecoder.interp.text_state import TEXT_STATES, state_mask
from rldecoder.interp.vocabulary import TOKEN_CLASSES, Vocabulary, visible

BoolArray = NDArray[np.bool_]
Offset = Annotated[int, Field(ge=-8, le=0)]
TokenId = Annotated[int, Field(ge=0)]
UNKNOWN = -1
"""Stands for a token or document that is not known (before a sequence's start, or not cached)."""


def _known(what: str, names: Mapping[str, str], value: str) -> str:
    if value not in names:
        raise ValueError(f"unknown {what} {value!r}, expected one of {[*names]}")
    return value


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TokenIn(_Node):
    """The token at `offset` is one of `tokens`."""

    kind: Literal["token_in"] = "token_in"
    tokens: tuple[TokenId, ...] = Field(min_length=1)
    """Token ids, increasing."""
    offset: Offset = 0
    """0 is the token itself, -1 the one before it."""

    @field_validator("tokens")
    @classmethod
    def _sorted(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))


class NgramIn(_Node):
    """The last tokens, the current one included, are one of `ngrams`."""

    kind: Literal["ngram_in"] = "ngram_in"
    ngrams: tuple[tuple[TokenId, ...], ...] = Field(min_length=1)
    """Token ids in reading order; all of one length, at least 2."""

    @field_validator("ngrams")
    @classmethod
    def _same_length(cls, value: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        lengths = {len(ngram) for ngram in value}
        if len(lengths) != 1 or min(lengths) < 2:
            raise ValueError("n-grams must be of one length, at least 2")
        return tuple(sorted(set(value)))


class Affix(_Node):
    """The token's text, stripped and in lower case, starts or ends with `text`."""

    kind: Literal["affix"] = "affix"
    side: Literal["prefix", "suffix"]
    text: str = Field(min_length=1)
    offset: Offset = 0


class TokenClass(_Node):
    """The token at `offset` belongs to a class of `vocabulary.TOKEN_CLASSES`."""

    kind: Literal["token_class"] = "token_class"
    name: Annotated[str, AfterValidator(partial(_known, "token class", TOKEN_CLASSES))]
    offset: Offset = 0


class PositionRange(_Node):
    """The position in the sequence lies in [low, high)."""

    kind: Literal["position"] = "position"
    low: int = Field(ge=0)
    high: int = Field(ge=1)


class TextState(_Node):
    """A state of `text_state.TEXT_STATES` holds, such as an open bracket."""

    kind: Literal["text_state"] = "text_state"
    name: Annotated[str, AfterValidator(partial(_known, "text state", TEXT_STATES))]


class Not(_Node):
    """The part does not hold."""

    kind: Literal["not"] = "not"
    part: Predicate


class And(_Node):
    """All parts hold."""

    kind: Literal["and"] = "and"
    parts: tuple[Predicate, ...] = Field(min_length=2)


class Or(_Node):
    """At least one part holds."""

    kind: Literal["or"] = "or"
    parts: tuple[Predicate, ...] = Field(min_length=2)


Atom = TokenIn | NgramIn | Affix | TokenClass | PositionRange | TextState
Predicate = Annotated[
    TokenIn | NgramIn | Affix | TokenClass | PositionRange | TextState | Not | And | Or,
    Field(discriminator="kind"),
]
for _model in (Not, And, Or):
    _model.model_rebuild()


def evaluate(predicate: Predicate, tokens: NDArray[Any], vocabulary: Vocabulary) -> BoolArray:
    """Where the predicate holds: [S, T] for a grid of token ids [S, T] (UNKNOWN = -1).

    A statement about a token that is not known (before a sequence's start) is false.
    """
    match predicate:
        case TokenIn():
            return vocabulary.token_table(predicate.tokens)[shifted(tokens, predicate.offset)]
        case Affix():
            table = vocabulary.affix_table(predicate.side, predicate.text)
            return table[shifted(tokens, predicate.offset)]
        case TokenClass():
            return vocabulary.class_table(predicate.name)[shifted(tokens, predicate.offset)]
        case NgramIn():
            return _matches_ngram(predicate, tokens, vocabulary)

        # These look at the whole row: where in it, what came before, what parts say.
        case PositionRange():
            position = np.arange(tokens.shape[1])
            inside = (position >= predicate.low) & (position < predicate.high)
            return np.broadcast_to(inside, tokens.shape).copy()
        case TextState():
            return state_mask(predicate.name, tokens, vocabulary)
        case Not():
            return ~evaluate(predicate.part, tokens, vocabulary)
        case And():
            masks = [evaluate(part, tokens, vocabulary) for part in predicate.parts]
            return np.logical_and.reduce(masks)
        case Or():
            masks = [evaluate(part, tokens, vocabulary) for part in predicate.parts]
            return np.logical_or.reduce(masks)
        case _:
            assert_never(predicate)


def num_atoms(predicate: Predicate) -> int:
    """How many atoms (leaves) a predicate has."""
    match predicate:
        case Not():
            return num_atoms(predicate.part)
        case And() | Or():
            return sum(num_atoms(part) for part in predicate.parts)
        case _:
            return 1


def conjunction(first: Predicate, second: Predicate) -> And:
    """`first and second`, flattened."""
    return And(parts=_flat(And, first) + _flat(And, second))


def disjunction(first: Predicate, second: Predicate) -> Or:
    """`first or second`, flattened."""
    return Or(parts=_flat(Or, first) + _flat(Or, second))


def describe(predicate: Predicate, vocabulary: Vocabulary, max_tokens: int = 8) -> str:
    """The predicate in words, for people; long token sets are cut after `max_tokens`."""
    match predicate:
        case TokenIn():
            return f"{_subject(predicate.offset)} is {_list(predicate, vocabulary, max_tokens)}"
        case NgramIn():
            return f"text ends with {_list(predicate, vocabulary, max_tokens)}"
        case Affix():
            verb = "starts" if predicate.side == "prefix" else "ends"
            return f'{_subject(predicate.offset)} {verb} with "{visible(predicate.text)}"'
        case TokenClass():
            return f"{_subject(predicate.offset)} {TOKEN_CLASSES[predicate.name]}"
        case PositionRange():
            return f"position is {predicate.low} to {predicate.high - 1}"
        case TextState():
            return TEXT_STATES[predicate.name]
        case Not():
            return f"not ({describe(predicate.part, vocabulary, max_tokens)})"
        case And():
            return " and ".join(_nested(part, vocabulary, max_tokens) for part in predicate.parts)
        case Or():
            return " or ".join(_nested(part, vocabulary, max_tokens) for part in predicate.parts)
        case _:
            assert_never(predicate)


def shifted(tokens: NDArray[Any], offset: int) -> NDArray[Any]:
    """[S, T] the token `-offset` positions earlier in the sequence (offset <= 0)."""
    if offset == 0:
        return tokens
    out = np.full_like(tokens, UNKNOWN)
    out[:, -offset:] = tokens[:, :offset]
    return out


def _matches_ngram(predicate: NgramIn, tokens: NDArray[Any], vocabulary: Vocabulary) -> BoolArray:
    length = len(predicate.ngrams[0])
    out = np.zeros(tokens.shape, bool)
    last = vocabulary.token_table([ngram[-1] for ngram in predicate.ngrams])[tokens]
    rows, columns = np.nonzero(last)
    rows, columns = rows[columns >= length - 1], columns[columns >= length - 1]
    if rows.size == 0:
        return out
    found = np.stack([tokens[rows, columns - length + 1 + i] for i in range(length)], axis=1)
    wanted = np.asarray(predicate.ngrams)
    out[rows, columns] = (found[:, None, :] == wanted[None]).all(2).any(1)
    return out


def _flat(kind: type[And] | type[Or], predicate: Predicate) -> tuple[Predicate, ...]:
    return predicate.parts if isinstance(predicate, kind) else (predicate,)


def _nested(part: Predicate, vocabulary: Vocabulary, max_tokens: int) -> str:
    text = describe(part, vocabulary, max_tokens)
    return f"({text})" if isinstance(part, And | Or) else text


def _subject(offset: int) -> str:
    if offset == 0:
        return "token"
    return "previous token" if offset == -1 else f"token {-offset} before"


def _list(predicate: TokenIn | NgramIn, vocabulary: Vocabulary, max_tokens: int) -> str:
    if isinstance(predicate, TokenIn):
        shown = [vocabulary.show(token) for token in predicate.tokens]
    else:
        shown = [
            '"' + "".join(vocabulary.show(token)[1:-1] for token in ngram) + '"'
            for ngram in predicate.ngrams
        ]
    more = len(shown) - max_tokens
    text = " or ".join(shown[:max_tokens])
    return f"{text} (and {more} more)" if more > 0 else text
