"""Where a text stands at a token, beyond the tokens just before: states that predicates can name.

A state is read from the sequence up to the token and never from what follows. It begins anew at a
special token, where another document does. S sequences, T positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rldecoder.interp.vocabulary import Vocabulary

BoolArray = NDArray[np.bool_]
TEXT_STATES: dict[str, str] = {
    "in_bracket": "a bracket is open",
    "plain": "none of the last 8 tokens contains a code symbol",
    "first_seen": "token is the first of its kind in the document",
}
"""State name -> how a label says it. Line starts, indentation, quotes, code blocks, sentence
positions and pairs seen before were tried and described no latent better
(docs/experiments/labels_atoms.md)."""
PLAIN_TOKENS = 8
_CLOSE_ALL = 1 << 20
"""More brackets than a sequence can open."""


def state_mask(name: str, tokens: NDArray[Any], vocabulary: Vocabulary) -> BoolArray:
    """[S, T] where a state of TEXT_STATES holds.

    Args:
        tokens: [S, T] ids; -1 where not known: nothing holds there.
    """
    if not tokens.size:
        return np.zeros(tokens.shape, bool)
    special = vocabulary.class_table("special")[tokens]
    match name:
        case "in_bracket":
            held = _in_bracket(tokens, special, vocabulary)
        case "plain":
            held = _plain(tokens, vocabulary)
        case _:
            held = _first_seen(tokens, special)
    return np.asarray(held & (tokens >= 0))


def _in_bracket(tokens: NDArray[Any], special: BoolArray, vocabulary: Vocabulary) -> BoolArray:
    """Brackets of any kind, closed ones taken off; an empty line closes all."""
    newline = vocabulary.class_table("newline")[tokens]
    before = np.zeros_like(newline)
    before[:, 1:] = newline[:, :-1]
    closed = special | vocabulary.blank_line[tokens] | (newline & before)
    change = np.where(closed, -_CLOSE_ALL, vocabulary.brackets[tokens])
    # A closing bracket without an opening one changes nothing: the depth is never below 0.
    depth = change.cumsum(1)
    return np.asarray(depth - np.minimum(np.minimum.accumulate(depth, 1), 0) > 0)


def _plain(tokens: NDArray[Any], vocabulary: Vocabulary) -> BoolArray:
    count = np.cumsum(vocabulary.class_table("code_symbol")[tokens], axis=1)
    before = np.zeros_like(count)
    before[:, PLAIN_TOKENS:] = count[:, :-PLAIN_TOKENS]
    return np.asarray(count == before)


def _first_seen(tokens: NDArray[Any], special: BoolArray) -> BoolArray:
    # One number for each sequence, document in it and token: its first cell is the first of a kind.
    row = np.arange(tokens.shape[0])[:, None]
    document = special.cumsum(1)
    kinds = (row * (tokens.shape[1] + 1) + document) * (int(tokens.max()) + 2) + tokens + 1
    _, first = np.unique(kinds, return_index=True)
    held = np.zeros(tokens.size, bool)
    held[first] = True
    return held.reshape(tokens.shape)
