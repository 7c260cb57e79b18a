"""Asking: cache first, then budget, then attempts with waits, and every attempt in the ledger."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Generic, NamedTuple, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from rldecoder.config.base import hash_json
from rldecoder.config.llm import Budget
from rldecoder.errors import BudgetExceededError, NoResourceError, RlDecoderError
from rldecoder.interp.llm.backends import AttemptError, ChatModel, ChatRequest, Reply
from rldecoder.interp.llm.parsing import MalformedAnswerError
from rldecoder.interp.llm.prompts import prompts_digest, repair_prompt
from rldecoder.interp.llm.storage import AnswerCache, Ledger, Spent

T = TypeVar("T")
DIGEST_CHARS = 16


class _StoppedError(Exception):
    """Another thread met the reason to stop."""


class Parsed(NamedTuple, Generic[T]):
    """What came of one question."""

    value: T | None
    """What the parser made of the answer; None with a failure (or if it says so itself)."""
    failure: str | None
    """Why there is no usable answer, in words of ours; None if there is one."""


class _Unreadable(NamedTuple):
    """An answer of another form than was asked for."""

    problem: str
    again: ChatRequest
    """The question put once more, with that answer."""


class Question(NamedTuple, Generic[T]):
    """A request and how its answer is read; the parser raises MalformedAnswerError."""

    request: ChatRequest
    parse: Callable[[str], T]


class ChatClient:
    """Asks one model, from several threads, within a budget shared with other clients.

    Answers (useless ones too) are cached by the hash of model, sampling, prompt and schema, so a
    killed run asks nothing twice. Attempts that brought no answer are not cached.
    """

    def __init__(self, model: ChatModel, cache: AnswerCache, spending: Spending) -> None:
        self.model, self._cache, self._spending = model, cache, spending
        self._prompts = prompts_digest()[:DIGEST_CHARS]
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._stopped = threading.Event()
        self._cause: BaseException | None = None

    def ask_all(
        self, questions: Sequence[Question[T]], on_answer: Callable[[], None] = lambda: None
    ) -> list[Parsed[T]]:
        """Ask all, `concurrency` at once; results in the order of the questions.

        Args:
            on_answer: called after each, from the thread that calls this.

        Raises:
            BudgetExceededError: the budget is spent. BadInputError: the server will never answer.
            NoResourceError: too many requests in a row brought nothing.
                In all three cases answers that came are kept.
        """

        self.model.ready()
        with ThreadPoolExecutor(self.model.concurrency) as pool:
            futures = [pool.submit(self._work, question) for question in questions]
            try:
                for future in as_completed(futures):
                    if future.result() is not None:
                        on_answer()
            except BaseException:  # Ctrl-C: what was not sent stays unsent
                self._stopped.set()
                raise
        if self._cause is not None:
            raise self._cause
        results = [future.result() for future in futures]
        return [result for result in results if result is not None]

    def peek(self, question: Question[T]) -> Parsed[T] | None:
        """What is known of a question without sending anything; None if it must be sent."""
        request = question.request
        for last in (False, True):
            reply = self._cache.get(self._key(request))
            if reply is None:
                return None
            read = _read(question, request, reply)
            if isinstance(read, Parsed) or last:
                return _settled(read)
            request = read.again
        raise AssertionError("unreachable")

    def _work(self, question: Question[T]) -> Parsed[T] | None:
        """One question in a thread; None once something stops them all."""
        try:
            return None if self._stopped.is_set() else self._ask(question)
        except _StoppedError:
            return None
        except Exception as error:
            with self._lock:
                self._cause = self._cause or error  # of several, the first is the true one
            self._stopped.set()
            return None

    def _ask(self, question: Question[T]) -> Parsed[T]:
        """One question, and once more with the useless answer if it cannot be read."""
        request = question.request
        for last in (False, True):
            reply, row = self._reply(request)
            if isinstance(reply, str):
                return Parsed(None, reply)
            read = _read(question, request, reply)
            if isinstance(read, Parsed):
                return read
            self._spending.ledger.change(row, outcome="malformed")
            if last:
                return _settled(read)
            request = read.again
        raise AssertionError("unreachable")

    def _reply(self, request: ChatRequest) -> tuple[Reply | str, int]:
        """The answer, or why none came; and the ledger's row."""
        key = self._key(request)
        about = {
            "purpose": request.purpose,
            "latent": request.latent,
            "model": self.model.name,
            "prompts": self._prompts,
            "request": key[:DIGEST_CHARS],
        }
        cached = self._cache.get(key)
        if cached is not None:
            free = {"tokens_in": 0, "tokens_out": 0, "cost": 0.0, "latency_seconds": 0.0}
            row = self._spending.ledger.add(
                **about, attempt=0, outcome=_outcome(cached), cached=1, **free
            )
            return cached, row

        # Each attempt passes the budget and stands in the ledger, so the retries are ours and not
        # those of the `openai` client.
        retrying = Retrying(
            stop=stop_after_attempt(self.model.max_attempts),
            wait=self._wait,
            retry=retry_if_exception(lambda e: isinstance(e, AttemptError) and e.again),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    number = attempt.retry_state.attempt_number
                    reply, row = self._attempt(request, about | {"attempt": number})
        except AttemptError as error:
            self._count_failure(error)
            return f"no answer came ({error.outcome.replace('_', ' ')})", -1

        with self._lock:
            self._failed_in_a_row = 0
        self._cache.put(key, reply)
        return reply, row

    def _attempt(self, request: ChatRequest, about: dict[str, Any]) -> tuple[Reply, int]:
        if self._stopped.is_set():
            raise _StoppedError

        # Counted at the most it can use before it is sent: a killed run must not forget it.
        count, prices = self.model.count_tokens(request.messages), self.model.prices
        most = Spent(
            1, count.most + request.max_tokens, prices.cost(count.most, request.max_tokens)
        )
        row = self._spending.reserve(most, about, count.most, request.max_tokens)
        started = time.monotonic()
        nothing = {"tokens_in": 0, "tokens_out": 0, "cost": 0.0}
        try:
            reply = self.model.send(request)
        except AttemptError as error:
            used = {} if error.billed else nothing
            self._spending.settle(
                row, outcome=error.outcome, latency_seconds=time.monotonic() - started, **used
            )
            raise
        except RlDecoderError:
            self._spending.settle(
                row, outcome="stopped", latency_seconds=time.monotonic() - started, **nothing
            )
            raise

        tokens_in = count.most if reply.tokens_in is None else reply.tokens_in
        tokens_out = request.max_tokens if reply.tokens_out is None else reply.tokens_out
        self._spending.settle(
            row,
            outcome=_outcome(reply),
            latency_seconds=time.monotonic() - started,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost=prices.cost(tokens_in, tokens_out),
        )
        return reply, row

    def _wait(self, state: RetryCallState) -> float:
        """What the server asked for, else 0.5, 1, 2, ... seconds; never beyond the maximum."""
        assert state.outcome is not None
        error = state.outcome.exception()
        assert isinstance(error, AttemptError)
        longest = self.model.max_wait_seconds
        if error.retry_after is not None:
            return min(error.retry_after, longest)
        return min(wait_exponential_jitter(multiplier=0.5, max=30, jitter=0.5)(state), longest)

    def _sleep(self, seconds: float) -> None:
        self._stopped.wait(seconds)  # returns at once when everything stops

    def _count_failure(self, error: AttemptError) -> None:
        """A server that is down, or takes no request, must not turn all latents into failures.

        Raises:
            NoResourceError: too many in a row.
        """
        with self._lock:
            self._failed_in_a_row += 1
            failed = self._failed_in_a_row
        if failed >= self.model.max_failed_in_a_row:
            raise NoResourceError(
                f"{failed} requests in a row to {self.model.name} brought no answer "
                f"(the last: {error.outcome.replace('_', ' ')}).",
                "A setting (`length_field`, `temperature`) does not suit the model, or the prompts "
                "are too long for it."
                if error.outcome == "rejected"
                else "The server is down, or its rate limit is far below what is sent.",
                "Answers that came are kept: mend the settings, run again later, or lower "
                "`concurrency`.",
            )

    def _key(self, request: ChatRequest) -> str:
        return hash_json(
            {
                "model": self.model.identity(),
                "messages": [list(message) for message in request.messages],
                "max_tokens": request.max_tokens,
                "schema": request.schema,
            }
        )


class Spending:
    """Ledger and budget: an attempt is counted, at the most it can use, before it is sent."""

    def __init__(self, ledger: Ledger, budget: Budget) -> None:
        self.ledger, self.budget = ledger, budget
        self._lock = threading.Lock()

    def reserve(self, most: Spent, about: dict[str, Any], tokens_in: int, tokens_out: int) -> int:
        """Count an attempt that is about to be sent; returns the ledger's row.

        Raises:
            BudgetExceededError: it might go over.
        """
        with self._lock:
            spent = self.ledger.spent()
            limits = (
                ("max_requests", self.budget.max_requests, spent.requests, most.requests),
                ("max_tokens", self.budget.max_tokens, spent.tokens, most.tokens),
                ("max_cost", self.budget.max_cost, spent.cost, most.cost),
            )
            for name, limit, used, more in limits:
                if limit is not None and used + more > limit:
                    raise BudgetExceededError(
                        f"The budget {name} = {limit:,.8g} would be exceeded: {used:,.8g} used, "
                        f"and the next request may use {more:,.8g}.",
                        "It was not sent. Answers that came are kept.",
                        f"Raise `label_features.llm.budget.{name}` and run again: it goes on "
                        "from here. `rldecoder estimate-labels` says what is still needed.",
                    )
            return self.ledger.add(
                **about, outcome="sent", cached=0, tokens_in=tokens_in, tokens_out=tokens_out,
                cost=most.cost, latency_seconds=0.0,
            )  # fmt: skip

    def settle(self, row: int, **values: Any) -> None:
        """What the attempt really used."""
        self.ledger.change(row, **values)


def _read(question: Question[T], request: ChatRequest, reply: Reply) -> Parsed[T] | _Unreadable:
    """What an answer says."""
    if reply.text is None:
        return Parsed(None, "the model refused")
    try:
        return Parsed(question.parse(reply.text), None)
    except MalformedAnswerError as error:
        if reply.finish == "length":
            return Parsed(None, "the answer was cut off")
        messages = repair_prompt(request.messages, reply.text, str(error))
        purpose = f"{question.request.purpose}_repair"
        return _Unreadable(str(error), request._replace(messages=messages, purpose=purpose))


def _settled(read: Parsed[T] | _Unreadable) -> Parsed[T]:
    if isinstance(read, Parsed):
        return read
    return Parsed(None, f"the answer cannot be read: {read.problem}")


def _outcome(reply: Reply) -> str:
    return {"length": "truncated", "refused": "refused"}.get(reply.finish, "answered")
