"""Any server that speaks OpenAI's chat completions, through the `openai` package.

The key is read from the environment when the client is made and lives only in it. A server's own
words are never repeated: an error body may hold the key that was sent, or the prompt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, cast
from urllib.parse import urlsplit

import httpx2
import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from rldecoder.config.llm import Endpoint, is_loopback
from rldecoder.errors import BadInputError
from rldecoder.interp.llm import backends
from rldecoder.interp.llm.prompts import Message

BYTES_PER_TOKEN = 3.5
"""Of JSON and English; only for what is expected, never for limits."""
OVERHEAD_TOKENS = 16
"""A chat template's own tokens around one message, at most."""
REPLY_TOKENS = 16
"""Its tokens before the answer, at most."""

_ATTEMPTS: ContextVar[backends.Attempts] = ContextVar("attempts")
"""Of the request that this thread sends."""


class _CountedClient(openai.DefaultHttpxClient):
    """Tells of each attempt, since the `openai` client repeats requests by itself."""

    def send(self, request: httpx2.Request, **settings: Any) -> httpx2.Response:
        """See `httpx2.Client`."""
        attempts = _ATTEMPTS.get()
        attempts.begin()
        try:
            response = super().send(request, **settings)
        except Exception as error:  # counted, whatever it is, and raised again
            late = isinstance(error, httpx2.TimeoutException)
            attempts.end("timeout" if late else "connection_error")
            raise
        if not response.is_success:
            attempts.end(_outcome(response.status_code), free=True)
        return response


class EndpointModel:
    """A model behind a server."""

    def __init__(self, config: Endpoint, temperature: float | None) -> None:
        self.config, self.temperature = config, temperature
        host = urlsplit(config.base_url).hostname or ""
        self.name = f"{config.model} at {host}"
        self.prices = backends.Prices(config.price_input, config.price_output)
        self.concurrency = config.concurrency
        self.max_failed_in_a_row = config.max_failed_in_a_row
        self._structured = config.structured

    def identity(self) -> dict[str, Any]:
        """See `ChatModel`."""
        return {
            "kind": "endpoint",
            "base_url": self.config.base_url,
            "model": self.config.model,
            "seed": self.config.seed,
            "structured": self.config.structured,
            "temperature": self.temperature,
        }

    def ready(self) -> None:
        """See `ChatModel`."""
        _key(self.config)

    @cached_property
    def _client(self) -> openai.OpenAI:
        host = urlsplit(self.config.base_url).hostname or ""
        # No redirects: they could lead to another host, or from https to http. A proxy of the
        # environment must not see what is meant for this machine.
        transport = _CountedClient(
            follow_redirects=False,
            trust_env=not is_loopback(host),
            timeout=self.config.timeout_seconds,
        )
        client = openai.OpenAI(
            api_key=_key(self.config),
            base_url=self.config.base_url,
            timeout=self.config.timeout_seconds,
            max_retries=self.config.max_attempts - 1,
            http_client=transport,
        )
        # Taken from OPENAI_ORG_ID and OPENAI_PROJECT_ID otherwise, and sent to any server.
        client.organization = client.project = None
        return client

    def count_tokens(self, messages: Sequence[Message]) -> backends.TokenCount:
        """Without the server's tokenizer: no token is shorter than a byte."""
        size = sum(len(message.content.encode()) for message in messages)
        overhead = REPLY_TOKENS + OVERHEAD_TOKENS * len(messages)
        return backends.TokenCount(round(size / BYTES_PER_TOKEN) + overhead // 2, size + overhead)

    def send(self, request: backends.ChatRequest, attempts: backends.Attempts) -> backends.Reply:
        """See `ChatModel`. A server that does not know `response_format` is asked without."""
        token = _ATTEMPTS.set(attempts)
        try:
            if not self._structured:
                return self._send(request, structured=False)
            try:
                return self._send(request, structured=True)
            except _UnacceptableError:
                reply = self._send(request, structured=False)
                self._structured = False
                return reply
        finally:
            _ATTEMPTS.reset(token)

    def _send(self, request: backends.ChatRequest, *, structured: bool) -> backends.Reply:
        # `from None`: the openai errors hold the server's words, which must not be shown.
        try:
            return _reply(self._create(request, structured))
        except openai.APITimeoutError:
            raise backends.NoAnswerError("timeout") from None
        except openai.APIConnectionError:
            raise backends.NoAnswerError("connection_error") from None
        except openai.APIStatusError as error:
            status = error.status_code
        except (openai.APIResponseValidationError, ValueError):  # says it is JSON and is not
            raise backends.NoAnswerError("server_error") from None
        if structured and status in (400, 422):
            raise _UnacceptableError
        raise self._failure(status)

    def _create(self, request: backends.ChatRequest, structured: bool) -> ChatCompletion:
        extra: dict[str, Any] = {self.config.length_field: request.max_tokens}
        if self.temperature is not None:
            extra["temperature"] = self.temperature
        if structured:
            schema = {"name": "answer", "strict": True, "schema": request.schema}
            extra["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.config.seed is not None:
            extra["seed"] = self.config.seed
        return self._client.chat.completions.create(
            model=self.config.model,
            messages=cast(
                "list[ChatCompletionMessageParam]", [m._asdict() for m in request.messages]
            ),
            **extra,
        )

    def _failure(self, status: int) -> Exception:
        if status in (401, 403):
            source = self.config.api_key_env
            return BadInputError(
                f"{self.name} refused the key (HTTP {status}).",
                f"It was read from the environment variable {source}."
                if source
                else "No key was sent: `api_key_env` is null.",
                "Set the variable to a key that may use this model, and run again.",
            )
        if status == 404 or 300 <= status < 400:
            return BadInputError(
                f"{self.config.base_url} has no chat completions for {self.config.model!r} "
                f"(HTTP {status}).",
                "The address or the model's name is wrong; redirects are not followed.",
                "Correct `label_features.llm`; the address usually ends with /v1.",
            )
        return backends.NoAnswerError(_outcome(status))


def _outcome(status: int) -> str:
    """What the ledger says of an HTTP status without an answer."""
    if status == 429:
        return "rate_limited"
    if status in (408, 409) or status >= 500:
        return "server_error"
    return "stopped" if status in (401, 403, 404) or status < 400 else "rejected"


class _UnacceptableError(Exception):
    """The server does not take the request with `response_format`."""


def _key(config: Endpoint) -> str:
    if config.api_key_env is None:
        return "none"  # the client wants one; servers without keys ignore it
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise BadInputError(
            f"The environment variable {config.api_key_env} is not set.",
            "`api_key_env` says that it holds the key of the endpoint.",
            f"Export {config.api_key_env}, or set `api_key_env: null` for a server without keys.",
        )
    return key


def _reply(completion: ChatCompletion) -> backends.Reply:
    usage = getattr(completion, "usage", None)
    tokens = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    tokens_in, tokens_out = (value if isinstance(value, int) else None for value in tokens)
    # The client does not check what a server sends against its own types.
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise backends.NoAnswerError("server_error")
    message = getattr(choices[0], "message", None)
    content, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    finish = getattr(choices[0], "finish_reason", None)
    if refusal or finish == "content_filter":
        return backends.Reply(None, "refused", tokens_in, tokens_out)
    text = content if isinstance(content, str) else ""
    return backends.Reply(text, "length" if finish == "length" else "stop", tokens_in, tokens_out)
