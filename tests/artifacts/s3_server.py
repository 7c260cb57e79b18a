"""An S3 server on the loopback (moto), and a proxy before it that puts faults into requests."""

from __future__ import annotations

import http.client
import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY, SECRET = "AKIAIOSFODNN7TESTING", "wJalrXUtnFEMIsecretK7MDENG"
_CONDITIONS = ("if-none-match", "if-match")
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>x</Message></Error>"
_DENIED = f"<Error><Code>AccessDenied</Code><Message>{SECRET}</Message></Error>".encode()


class Proxy(ThreadingHTTPServer):
    """Hands requests on to a server, but for those that it spoils.

    Args:
        port: of the server.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port_behind = port
        self.rates: dict[str, float] = {}
        """Share of requests with a fault: `error`, `slow`, `denied`, `drop`, `lost` (the answer
        to a request that was carried out), `truncate`, `flip` (a byte of a body), `hang`."""
        self.blind = False
        """Conditions are not handed on, as by servers that do not know them."""
        self.put_in: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self._random = random.Random(0)
        self._lock = threading.Lock()
        # moto looks and writes in two steps; S3 does both at once.
        self.writes = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str | None:
        """The next request's, if any."""
        with self._lock:
            draw = self._random.random()
            for name, rate in self.rates.items():
                if draw < rate:
                    self.put_in[name] += 1
                    return name
                draw -= rate
        return None

    def quiet(self) -> None:
        """No faults from now on."""
        self.rates = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that were dropped on purpose are not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault()
        with self.server._lock:
            self.server.requests.append((self.command, self.path))
        if fault in ("error", "slow", "denied"):
            status, text = {
                "error": (500, b""), "slow": (503, _SLOW_DOWN), "denied": (403, _DENIED),
            }[fault]  # fmt: skip
            self._answer(status, {"Content-Type": "application/xml"}, text, None)
            return
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "hang":
            time.sleep(3)
        with self.server.writes:
            behind = http.client.HTTPConnection("127.0.0.1", self.server.port_behind, timeout=60)
            asked = dict(self.headers)
            if self.server.blind:
                asked = {k: v for k, v in asked.items() if k.lower() not in _CONDITIONS}
            behind.request(self.command, self.path, body, asked)
            answer = behind.getresponse()
            content, headers = answer.read(), dict(answer.getheaders())
            behind.close()
        if fault == "lost":
            self.close_connection = True
            self.connection.close()
            return
        self._answer(answer.status, headers, content, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: str | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncate" and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        if fault == "flip" and body and re.search("/files/", self.path):
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.wfile.write(body)
