"""Asking: cache first, then budget, then attempts, each of them in the ledger."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.pool import ThreadPool
from typing import Any, Generic, NamedTuple, TypeVar

from rldecoder.config.base import hash_json
from rldecoder.errors import NoResourceError
from rldecoder.interp.llm.backends import ChatModel, ChatRequest, NoAnswerError, Reply
from rldecoder.interp.llm.parsing import MalformedAnswerError
from rldecoder.interp.llm.prompts import prompts_digest, repair_prompt
from rldecoder.interp.llm.storage import Database, Ledger, Spent

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


class Unreadable(NamedTuple):
    """An answer of another form than was asked for."""

    problem: str
    again: ChatRequest
    """The question put once more, with that answer."""


class Question(NamedTuple, Generic[T]):
    """A request and how its answer is read; the parser raises MalformedAnswerError."""

    request: ChatRequest
    parse: Callable[[str], T]
    stand_in: T | None = None
    """Taken for the answer where nothing is sent, by a dry run."""


class ChatClient:
    """Asks one model, from several threads, within a budget shared with other clients.

    Answers (useless ones too) are cached by the hash of model, sampling, prompt and schema, so a
    killed run asks nothing twice. Attempts that brought no answer are not cached.
    """

    def __init__(self, model: ChatModel, database: Database, ledger: Ledger) -> None:
        self.model, self.database, self.ledger = model, database, ledger
        self.prompts = prompts_digest()[:DIGEST_CHARS]
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
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
        found: dict[int, Parsed[T]] = {}
        with ExitStack() as stack:
            spread: Callable[..., Any] = map
            if self.model.concurrency > 1:
                # Nobody waits for its threads: after Ctrl-C one may be sleeping for a minute.
                spread = stack.enter_context(ThreadPool(self.model.concurrency)).imap_unordered
            try:
                for place, answer in spread(self._work, enumerate(questions)):
                    if answer is not None:
                        found[place] = answer
                        on_answer()
            except BaseException:  # Ctrl-C: what was not sent stays unsent
                self.stopped.set()
                raise
        if self._cause is not None:
            raise self._cause
        return [found[place] for place in range(len(questions))]

    def _work(self, item: tuple[int, Question[T]]) -> tuple[int, Parsed[T] | None]:
        """One question in a thread; None once something stops them all."""
        place, question = item
        try:
            return place, None if self.stopped.is_set() else self.ask(question)
        except _StoppedError:
            return place, None
        except Exception as error:  # raised again by `ask_all`, in the thread of who asked
            with self._lock:
                self._cause = self._cause or error  # of several, the first is the true one
            self.stopped.set()
            return place, None

    def ask(self, question: Question[T]) -> Parsed[T]:
        """One question, and once more with the useless answer if it cannot be read."""
        read = self.answer(question, question.request)
        if isinstance(read, Unreadable):
            read = self.answer(question, read.again)
        if isinstance(read, Unreadable):
            return Parsed(None, f"the answer cannot be read: {read.problem}")
        return read

    def answer(self, question: Question[T], request: ChatRequest) -> Parsed[T] | Unreadable:
        """What the answer says, or why none came."""
        key = self.key(request)
        attempts = _Attempts(self, request, key)
        reply = self.database.get(key)
        if reply is not None:
            read = read_answer(question, request, reply)
            attempts.cached(_outcome(reply, read))
            return read

        try:
            reply = self.model.send(request, attempts)
        except NoAnswerError as error:
            attempts.end(error.outcome)
            self._count_failure(error)
            return Parsed(None, f"no answer came ({error.outcome.replace('_', ' ')})")
        with self._lock:
            self._failed_in_a_row = 0
        read = read_answer(question, request, reply)
        attempts.answered(_outcome(reply, read), reply)
        self.database.put(key, reply)
        return read

    def _count_failure(self, error: NoAnswerError) -> None:
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

    def key(self, request: ChatRequest) -> str:
        """What its answer is known by."""
        return hash_json(
            {
                "model": self.model.identity(),
                "messages": [list(message) for message in request.messages],
                "max_tokens": request.max_tokens,
                "schema": request.schema,
            }
        )


class _Attempts:
    """One request's attempts, each within the budget before it is sent, and in the ledger."""

    def __init__(self, client: ChatClient, request: ChatRequest, key: str) -> None:
        self._client, self._request = client, request
        self._about = {
            "purpose": request.purpose,
            "latent": request.latent,
            "model": client.model.name,
            "prompts": client.prompts,
            "request": key[:DIGEST_CHARS],
        }
        self._number = 0
        self._row: int | None = None
        self._began = 0.0

    def begin(self) -> None:
        """See `Attempts`: counted at the most it can use, since a killed run must not forget it.

        Raises:
            BudgetExceededError: it might go over.
        """
        if self._client.stopped.is_set():
            raise _StoppedError
        model, longest = self._client.model, self._request.max_tokens
        tokens = model.count_tokens(self._request.messages).most
        most = Spent(1, tokens + longest, model.prices.cost(tokens, longest))
        self._number, self._began = self._number + 1, time.monotonic()
        self._row = self._add("sent", tokens, longest, most)

    def cached(self, outcome: str) -> None:
        """The answer was known."""
        self._add(outcome, 0, 0, None)

    def _add(self, outcome: str, tokens_in: int, tokens_out: int, most: Spent | None) -> int:
        cost = most.cost if most is not None else 0.0
        use = {"tokens_in": tokens_in, "tokens_out": tokens_out, "cost": cost}
        state = {"attempt": self._number, "outcome": outcome, "cached": int(most is None)}
        return self._client.ledger.add({**self._about, **state, **use, "latency_seconds": 0}, most)

    def end(self, outcome: str, *, free: bool = False) -> None:
        """See `Attempts`."""
        self._settle(outcome, {"tokens_in": 0, "tokens_out": 0, "cost": 0} if free else {})

    def answered(self, outcome: str, reply: Reply) -> None:
        """The last one brought an answer; what the model does not count stays at the most."""
        tokens_in, tokens_out = reply.tokens_in, reply.tokens_out
        if tokens_in is None:
            tokens_in = self._client.model.count_tokens(self._request.messages).most
        if tokens_out is None:
            tokens_out = self._request.max_tokens
        cost = self._client.model.prices.cost(tokens_in, tokens_out)
        self._settle(outcome, {"tokens_in": tokens_in, "tokens_out": tokens_out, "cost": cost})

    def _settle(self, outcome: str, use: Mapping[str, float]) -> None:
        if self._row is not None:
            seconds = time.monotonic() - self._began
            self._client.ledger.change(
                self._row, {"outcome": outcome, "latency_seconds": seconds, **use}
            )
        self._row = None


def read_answer(
    question: Question[T], request: ChatRequest, reply: Reply
) -> Parsed[T] | Unreadable:
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
        return Unreadable(str(error), request._replace(messages=messages, purpose=purpose))


def _outcome(reply: Reply, read: Parsed[Any] | Unreadable) -> str:
    """What the ledger says of an answer."""
    if isinstance(read, Unreadable):
        return "malformed"
    return {"length": "truncated", "refused": "refused"}.get(reply.finish, "answered")
