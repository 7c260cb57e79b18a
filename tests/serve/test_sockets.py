"""The running server, over real sockets: who is turned away, and who is dropped."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from rldecoder.serve.patience import PatientProtocol
from rldecoder.serve.served import Served
from tests.serve.conftest import Running, catalogue_of

BODIES: dict[str, dict[str, Any]] = {
    "/api/trace": {"prompt": "a b c"},
    "/api/position": {"prompt": "a b c", "position": 1},
    "/api/intervene": {"prompt": "a b c", "position": 1},
    "/api/explain": {"prompt": "a b c", "position": 1},
    "/api/compare": {"prompt": "a b c", "other": "a b"},
    "/api/token": {"text": "a"},
    "/api/steer": {"prompt": "a b c", "new_tokens": 2},
    "/api/reviews": {"latent": 1, "reviewer": "eve", "accept": True},
}
PAGES = ("/", "/report")
FILLED = {
    "/static/{name}": "/static/trace.js",
    "/api/features/{latent}": "/api/features/1",
    "/api/features/{latent}/contexts": "/api/features/1/contexts",
    "/api/find": "/api/find?words=a",
}


@pytest.fixture(scope="module")
def hardly_reviewed(
    served: Served,
    debug_labels: Path,
    debug_clusters: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    """The debug run with a file of verdicts for these tests."""
    reviews = tmp_path_factory.mktemp("sockets") / "reviews.jsonl"
    return served._replace(catalogue=catalogue_of(debug_labels, debug_clusters, reviews))


@pytest.fixture(scope="module")
def running(hardly_reviewed: Served) -> Iterator[Running]:
    """One server for all that changes nothing."""
    with Running(hardly_reviewed) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(hardly_reviewed: Served) -> Iterator[Running]:
    """A server whose clients have half a second for a request."""
    with pytest.MonkeyPatch.context() as patch, Running(hardly_reviewed) as server:
        patch.setattr(PatientProtocol, "request_seconds", 0.5)
        patch.setattr(PatientProtocol, "answer_seconds", 0.5)
        yield server


def talk(server: Running, request: bytes) -> tuple[int, bytes]:
    """Status and whole answer to raw bytes that ask for an end of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as line:
        line.sendall(request)
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    return int(answer.split(b" ", 2)[1]), answer


def ask(server: Running, method: str, target: str, headers: dict[str, str]) -> tuple[int, bytes]:
    body = b"" if method in ("GET", "HEAD", "OPTIONS") else json.dumps(BODIES[target]).encode()
    lines = [
        f"{method} {target} HTTP/1.1",
        "connection: close",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    if body:
        lines += [f"content-length: {len(body)}", "content-type: application/json"]
    return talk(server, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body)


def routes(server: Running) -> list[tuple[str, str]]:
    """Method and a path of every route that the application has."""
    app: Any = server.app.app
    found = [
        (method, FILLED.get(route.path, route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]
    assert len(found) >= 10
    return found


def test_foreign_requests_are_refused_at_every_route(running: Running) -> None:
    """The token is right in all of them: what is refused is where they come from."""
    own = f"127.0.0.1:{running.port}"
    ours = {"host": own, "origin": f"http://{own}", "x-rldecoder-token": running.app.token}
    hosts = (
        "evil.example", f"localhost.evil.example:{running.port}", "127.0.0.1.evil.example",
        "localhost.", "user@127.0.0.1", "[::1", "[::ffff:127.0.0.1]", "::1", "0.0.0.0", "127.1",
    )  # fmt: skip
    foreign: list[dict[str, str]] = [
        *(ours | {"host": host, "origin": f"http://{host}"} for host in hosts),
        *(
            ours | {"origin": origin}
            for origin in (
                "http://evil.example", "null", f"http://{own}.evil.example", "http://127.0.0.1:1",
                f"http://localhost:{running.port}", "http://", "file://",
            )
        ),
        ours | {"sec-fetch-site": "cross-site"},
        ours | {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
        {"host": own, "x-rldecoder-token": running.app.token, "sec-fetch-site": "cross-site"},
        ours | {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
                "sec-fetch-dest": "iframe"},
    ]  # fmt: skip
    for method, path in routes(running):
        for headers in foreign:
            status, answer = ask(running, method, path, headers)
            assert status in (400, 403, 421), (method, path, headers, answer[:300])
            assert running.app.token.encode() not in answer
        status, answer = ask(running, method, path, ours)
        assert status in (200, 201, 400), (method, path, answer[:300])
    lines = running.reviews.read_text().splitlines() if running.reviews.is_file() else []
    assert len(lines) <= 1  # our own


def test_other_forms_of_a_request_are_refused(running: Running) -> None:
    own = f"127.0.0.1:{running.port}"
    for first, more in (
        (f"GET http://{own}/ HTTP/1.1", f"Host: {own}\r\n"),
        ("GET http://evil.example/api/queue HTTP/1.1", f"Host: {own}\r\n"),
        ("GET / HTTP/1.1", ""),
        ("GET / HTTP/1.0", ""),
        ("GET / HTTP/1.1", f"Host: {own}\r\nHost: evil.example\r\n"),
        ("GET / HTTP/1.1", f"Host: {own}\r\nOrigin: http://{own}\r\nOrigin: http://evil\r\n"),
        ("OPTIONS * HTTP/1.1", f"Host: {own}\r\n"),
        ("CONNECT evil.example:443 HTTP/1.1", f"Host: {own}\r\n"),
        ("TRACE / HTTP/1.1", f"Host: {own}\r\n"),
        ("GET /api/queue HTTP/1.1", f"Host: {own}\r\nSec-Fetch-Site: cross-site\r\n"),
    ):
        status, answer = talk(running, f"{first}\r\n{more}Connection: close\r\n\r\n".encode())
        assert status in (400, 403, 405, 421), (first, answer[:300])
        assert b'rldecoder-token" content' not in answer
    upgrade = "Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    status, _ = talk(running, f"GET / HTTP/1.1\r\nHost: {own}\r\n{upgrade}\r\n".encode())
    assert status != 101


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000, b'{"prompt":' * 10_000, b'{"prompt": ' + b"9" * 100_000 + b"}",
        b'{"prompt": "x", "prompt": "y", "a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"prompt": "\\ud800"}', b'{"prompt": 1e999999}', b"\x00" * 1000, b"\xff" * 1000,
    ],
    ids=["lists", "objects", "digits", "balanced", "surrogate", "exponent", "nul", "bytes"],
)  # fmt: skip
def test_bodies_that_are_bombs_are_answered(running: Running, body: bytes) -> None:
    own = f"127.0.0.1:{running.port}"
    head = (
        f"POST /api/trace HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\nX-Rldecoder-Token: "
        f"{running.app.token}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n"
    )
    status, answer = talk(running, f"{head}\r\n".encode() + body)
    assert status in (400, 422), answer[:300]
    assert b'"what"' in answer
    assert len(answer) < 5000


def test_numbers_in_addresses_are_bounded(running: Running) -> None:
    headers = {"host": f"127.0.0.1:{running.port}"}
    for path in (
        "/api/features/" + "9" * 9000,
        "/api/features?start=" + "9" * 9000,
        "/api/features?words=" + "x" * 9000,
        "/api/queue?count=" + "9" * 5000,
    ):
        status, _ = ask(running, "GET", path, headers)
        assert status == 422


def dropped_after(line: socket.socket, drip: bytes) -> float:
    """Seconds until the server drops a connection on which a byte comes now and then."""
    started = time.monotonic()
    line.settimeout(0.05)
    while time.monotonic() - started < 10:
        try:
            if drip:
                line.sendall(drip)
            if not line.recv(65536):
                break
        except TimeoutError:
            continue
        except OSError:  # reset, or broken pipe
            break
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("sent", "drip"),
    [
        (b"", b""),
        (b"G", b""),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"X-A: b\r\n"),
        (b"POST /api/trace HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\n"
         b"X-Rldecoder-Token: {token}\r\nContent-Type: application/json\r\n"
         b"Content-Length: 5000\r\n\r\n", b"x"),
        (b"POST /api/trace HTTP/1.1\r\nHost: evil\r\nContent-Length: 5000\r\n\r\n", b"x"),
        (b"POST /api/trace HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\n"
         b"X-Rldecoder-Token: {token}\r\nContent-Type: application/json\r\n"
         b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"GET / HTTP/1.1\r\nHost: {own}\r\n\r\nGET / HT", b"T"),
    ],
    ids=["nothing", "one byte", "headers", "body", "refused body", "chunks", "second request"],
)  # fmt: skip
def test_slow_clients_are_dropped(impatient: Running, sent: bytes, drip: bytes) -> None:
    own = f"127.0.0.1:{impatient.port}".encode()
    sent = sent.replace(b"{own}", own).replace(b"{token}", impatient.app.token.encode())
    with socket.create_connection(("127.0.0.1", impatient.port)) as line:
        line.sendall(sent)
        assert 0.3 < dropped_after(line, drip) < 5


def test_who_does_not_read_the_answer_is_dropped(impatient: Running) -> None:
    own = f"127.0.0.1:{impatient.port}"
    with socket.create_connection(("127.0.0.1", impatient.port)) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):  # it is dropped, which is what is wanted
            line.settimeout(0.2)
            line.sendall(f"GET /report HTTP/1.1\r\nHost: {own}\r\n\r\n".encode() * 200)
        time.sleep(1.5)
        with pytest.raises(OSError):
            for _ in range(100):
                line.sendall(b"x" * 4096)
                time.sleep(0.01)


def test_a_crowd_of_silent_clients_keeps_nobody_out(
    hardly_reviewed: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientProtocol, "max_connections", 4)
    with Running(hardly_reviewed) as server, contextlib.ExitStack() as stack:
        for number in range(20):
            line = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            line.sendall(b"GET / HTTP/1.1\r\n" if number % 2 else b"")
        for _ in range(5):
            status, answer = ask(server, "GET", "/", {"host": "127.0.0.1"})
            assert status == 200
            assert re.search(rb"rldecoder-token", answer)


def test_a_patient_client_keeps_its_connection(impatient: Running) -> None:
    own = f"127.0.0.1:{impatient.port}"
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=5) as line:
        for _ in range(3):
            line.sendall(f"HEAD /static/icon.svg HTTP/1.1\r\nHost: {own}\r\n\r\n".encode())
            assert line.recv(65536).startswith(b"HTTP/1.1 ")
            time.sleep(0.7)  # longer than a request may take, shorter than the pause between two
