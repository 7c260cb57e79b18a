"""What an effect is about: log p of a token, or how far it leads another one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rldecoder.errors import BadInputError
from rldecoder.explain.prompts import token_text
from rldecoder.lm.frozen import FrozenLM


class Target(NamedTuple):
    """A number that a prediction has, in nats."""

    token_id: int
    """Its log p counts."""
    minus_id: int | None = None
    """Another one, whose log p is taken off: what is left is the difference of the two logits."""

    def of(self, logprobs: Tensor) -> Tensor:
        """From log probabilities [..., V]: [...]."""
        value = logprobs[..., self.token_id]
        return value if self.minus_id is None else value - logprobs[..., self.minus_id]


def find_target(lm: FrozenLM, token: str | int, minus: str | int | None = None) -> Target:
    """A target by the text or the number of its tokens.

    Args:
        token: a text counts with its spaces: " cat" and "cat" are two tokens.
        minus: see `Target.minus_id`.

    Raises:
        BadInputError: a text that is no single token, a number that no token has, or a token less
            itself.
    """
    target = Target(find_token(lm, token), None if minus is None else find_token(lm, minus))
    if target.token_id == target.minus_id:
        raise BadInputError(
            "A token less itself is always 0.", "Both sides are the same.", "Name another one."
        )
    return target


def find_token(lm: FrozenLM, token: str | int) -> int:
    """The number of a token, given that or its text.

    Raises:
        BadInputError: the text is no single token, or no token has the number.
    """
    if isinstance(token, int):
        if not 0 <= token < lm.vocab_size:
            raise BadInputError(
                f"There is no token {token}.",
                f"The vocabulary has tokens 0 to {lm.vocab_size - 1}.",
                "Choose one of those.",
            )
        return token

    ids = lm.tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        parts = ", ".join(repr(token_text(lm, part)) for part in ids[:8])
        raise BadInputError(
            f"{token[:60]!r} is not one token.",
            f"The model reads {len(ids)}: {parts}." if ids else "It is empty.",
            "Give the text of a single token; most words begin with a space.",
        )
    return int(ids[0])
