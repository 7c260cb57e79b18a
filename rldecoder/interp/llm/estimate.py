"""What a run would send and cost: the run itself, with a client that counts and sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rldecoder.interp.llm.backends import ChatRequest
from rldecoder.interp.llm.client import ChatClient, Parsed, Question, T, Unreadable, read_answer

EXPECTED_ANSWER = 0.25
"""Share of the longest answer that an answer is expected to take, where nothing better is known."""


class Estimate(NamedTuple):
    """Requests still to be sent. Expected values assume one attempt a question, no repair."""

    requests: int = 0
    cached: int = 0
    """Questions whose answer is known already, or will be when they are asked again."""
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


class DryClient(ChatClient):
    """Answers from the cache, else with a question's stand-in, which it adds to `total`."""

    def __init__(self, client: ChatClient) -> None:
        super().__init__(client.model, client.database, client.ledger)
        self.total = Estimate()
        self._counted: set[str] = set()

    def ask_all(
        self, questions: Sequence[Question[T]], on_answer: Callable[[], None] = lambda: None
    ) -> list[Parsed[T]]:
        """See `ChatClient`."""
        return [self.ask(question) for question in questions]

    def ask(self, question: Question[T]) -> Parsed[T]:
        """See `ChatClient`."""
        before = self.total.requests
        found = super().ask(question)
        if self.total.requests == before:
            self.total += Estimate(cached=1)
        return found

    def answer(self, question: Question[T], request: ChatRequest) -> Parsed[T] | Unreadable:
        """See `ChatClient`."""
        key = self.key(request)
        reply = self.database.get(key)
        if reply is not None:
            return read_answer(question, request, reply)

        if key not in self._counted:
            self._counted.add(key)
            count, longest = self.model.count_tokens(request.messages), request.max_tokens
            expected = request.expected_tokens
            if expected is None:
                expected = round(longest * EXPECTED_ANSWER)
            # The repair repeats the prompt, the answer (cut at 500 characters, each escaped to at
            # most 12 bytes) and a sentence.
            most_in = 2 * count.most + 12 * 500 + 500
            cost = self.model.prices.cost
            self.total += Estimate(
                1,
                0,
                count.expected,
                expected,
                cost(count.expected, expected),
                most_in + 2 * longest,
                cost(most_in, 2 * longest),
            )
        return Parsed(question.stand_in, None)
