"""A real HTTP server on the loopback that behaves as chat servers do, badly too."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

KEY = "sk-test-0123456789-very-secret"


class Answer(NamedTuple):
    """What the server sends."""

    status: int = 200
    body: Any = None
    """Bytes as they are; anything else as JSON."""
    headers: Mapping[str, str] = MappingProxyType({})
    delay: float = 0.0


Behave = Callable[[dict[str, Any], int], Answer]
"""From a request's JSON and its number, from 0, to an answer."""


@dataclass
class FakeServer:
    """The server and what it has seen."""

    behave: Behave
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def said(
    content: str | None, *, finish: str = "stop", refusal: str | None = None, usage: bool = True
) -> Answer:
    """A chat completion with 100 prompt and 10 answer tokens."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    body: dict[str, Any] = {
        "id": "x", "object": "chat.completion", "created": 0, "model": "fake",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }  # fmt: skip
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return Answer(body=body)


def label(text: str | None) -> Answer:
    """A labeler's good answer."""
    return said(json.dumps({"label": text}))


def data_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON lines between the fences of a request's first user message."""
    text = next(m["content"] for m in body["messages"] if m["role"] == "user")
    found = re.search(r"=== BEGIN DATA (\w+)\n(.*)\n=== END DATA \1", text, re.DOTALL)
    assert found is not None
    return [json.loads(line) for line in found[2].split("\n")]


@contextmanager
def serve(behave: Behave) -> Iterator[FakeServer]:
    """The server, until the block ends."""
    fake = FakeServer(behave)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            with fake.lock:
                number = len(fake.bodies)
                fake.bodies.append(json.loads(raw))
                fake.headers.append({k.lower(): v for k, v in self.headers.items()})
                fake.in_flight += 1
                fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
            try:
                answer = fake.behave(fake.bodies[number], number)
                time.sleep(answer.delay)
            finally:
                with fake.lock:
                    fake.in_flight -= 1
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body)
            content = body if isinstance(body, bytes) else body.encode()
            try:
                self.send_response(answer.status)
                # Errors without a Retry-After of their own ask for a short one.
                soon = {"Retry-After-Ms": "20"} if answer.status >= 400 else {}
                headers = answer.headers or soon
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client had given up, as it should

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
