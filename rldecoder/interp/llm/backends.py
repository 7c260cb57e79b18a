"""What a language model behind the labeler or the judge must offer, and how it can fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from rldecoder.interp.llm.parsing import AnswerSchema
from rldecoder.interp.llm.prompts import Message

Purpose = str
"""label, detection, planted_detection, random_sae_label, ...: what a request is for."""


class ChatRequest(NamedTuple):
    """One question to a model."""

    purpose: Purpose
    latent: int
    messages: tuple[Message, ...]
    max_tokens: int
    """Longest answer."""
    schema: AnswerSchema
    """Of the answer, for servers that can enforce it."""
    expected_tokens: int | None = None
    """How long an answer is expected to be, for estimates; None: a share of the longest."""


class Reply(NamedTuple):
    """What a model answered. It may be useless; but it came."""

    text: str | None
    finish: str
    """stop; length (cut off); refused (by the model or a filter: `text` is None)."""
    tokens_in: int | None
    """As the model counts them; None if it does not say."""
    tokens_out: int | None


class TokenCount(NamedTuple):
    """Tokens of a prompt."""

    expected: int
    most: int
    """It cannot have more."""


class Prices(NamedTuple):
    """US dollars a million tokens."""

    input: float = 0.0
    output: float = 0.0

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """US dollars of so many tokens."""
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


class NoAnswerError(Exception):
    """No attempt brought an answer.

    Args:
        outcome: the last one's: timeout, rate_limited, server_error, connection_error or rejected.
    """

    def __init__(self, outcome: str) -> None:
        self.outcome = outcome
        super().__init__(outcome)


class Attempts(Protocol):
    """Where a model says what it sends for one request."""

    def begin(self) -> None:
        """An attempt is about to be sent. Raises what stops everything, such as a budget."""
        ...

    def end(self, outcome: str, *, free: bool = False) -> None:
        """It brought no answer; `free`: it was not charged for. Again: nothing happens."""
        ...


class ChatModel(Protocol):
    """A model that answers chats. Calls may come from several threads."""

    name: str
    """For people and the ledger."""
    prices: Prices
    concurrency: int
    """Requests on their way at once."""
    max_failed_in_a_row: int

    def identity(self) -> dict[str, Any]:
        """What decides its answers beside the request; never a key. Part of the cache's key."""
        ...

    def ready(self) -> None:
        """Check what can be checked without sending anything.

        Raises:
            BadInputError: a key is missing.
        """
        ...

    def count_tokens(self, messages: Sequence[Message]) -> TokenCount:
        """How long a prompt is."""
        ...

    def send(self, request: ChatRequest, attempts: Attempts) -> Reply:
        """Ask, and where that may help ask again; each attempt begins and ends in `attempts`.

        Raises:
            NoAnswerError: no answer came.
            RlDecoderError: it will never work (wrong key, no such model): everything stops.
        """
        ...
