"""What a run would send and cost, counted without sending."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from rldecoder.interp.llm.client import ChatClient, Question

EXPECTED_ANSWER = 0.25
"""Share of the longest answer that an answer is expected to take, where nothing better is known."""


class Estimate(NamedTuple):
    """Requests still to be sent. Expected values assume one attempt a question, no repair."""

    requests: int = 0
    cached: int = 0
    """Questions whose answer is known already."""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    """US dollars, by the configured prices."""
    most_tokens: int = 0
    """One attempt and one repair of each question cannot use more."""
    most_cost: float = 0.0

    @property
    def tokens(self) -> int:
        """Expected tokens, both ways."""
        return self.tokens_in + self.tokens_out

    def __add__(self, other: Any) -> Estimate:
        """Both together."""
        return Estimate(*(a + b for a, b in zip(self, other, strict=True)))


def add_up(client: ChatClient, questions: Iterable[Question[Any]]) -> Estimate:
    """The estimate of some questions to one model."""
    total, prices = Estimate(), client.model.prices
    for question in questions:
        if client.peek(question) is not None:
            total += Estimate(cached=1)
            continue
        request = question.request
        count, longest = client.model.count_tokens(request.messages), request.max_tokens
        answer = request.expected_tokens
        if answer is None:
            answer = round(longest * EXPECTED_ANSWER)
        # The repair repeats the prompt, the answer (cut at 500 characters, each escaped to at most
        # 12 bytes) and a sentence.
        most_in = 2 * count.most + 12 * 500 + 500
        total += Estimate(
            1,
            0,
            count.expected,
            answer,
            prices.cost(count.expected, answer),
            most_in + 2 * longest,
            prices.cost(most_in, 2 * longest),
        )
    return total
