"""Who may ask what: names, origins, tokens, sizes; and what the browser is told."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from rldecoder.serve.guard import HEADERS
from tests.serve.conftest import HOST, PROMPT

BODY = {"prompt": PROMPT}


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8760", "", "0.0.0.0:8760"]
)
def test_other_names_are_turned_away(client: TestClient, host: str) -> None:
    for answer in (
        client.get("/", headers={"host": host}),
        client.get("/static/trace.js", headers={"host": host}),
        client.post("/api/trace", json=BODY, headers={"host": host, "origin": f"http://{host}"}),
    ):
        assert answer.status_code == 421
        assert "rebinding" in answer.text
        assert "test-token" not in answer.text


@pytest.mark.parametrize("host", ["localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:8760"])
def test_our_own_names_are_answered_at_any_port(client: TestClient, host: str) -> None:
    """A tunnel changes the port."""
    there = {"host": host, "origin": f"http://{host}"}
    assert client.get("/", headers=there).status_code == 200
    assert client.post("/api/trace", json=BODY, headers=there).status_code == 200
    assert client.get("/", headers=there | {"origin": "http://localhost:2"}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"x-rldecoder-token": ""},
        {"x-rldecoder-token": "wrong"},
        {"x-rldecoder-token": "é"},
    ],
)
def test_posts_of_other_pages_are_refused(client: TestClient, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for path, body in (
        ("/api/trace", BODY),
        ("/api/reviews", {"latent": 1, "reviewer": "eve", "accept": True}),
    ):
        answer = client.post(path, json=body, headers=raw)
        assert answer.status_code == 403
        assert answer.json()["error"]["what"]


def test_a_post_without_origin_or_token_is_refused(client: TestClient) -> None:
    for name in ("origin", "x-rldecoder-token"):
        del client.headers[name]
        assert client.post("/api/trace", json=BODY).status_code == 403


def test_other_pages_may_link_here_but_not_read_the_api(client: TestClient) -> None:
    there = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=there).status_code == 200
    assert client.get("/api/queue", headers=there).status_code == 403
    assert client.get("/static/trace.js", headers={"sec-fetch-site": "cross-site"}).is_error


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(client: TestClient, kind: str) -> None:
    """What forms can send without a preflight is not accepted."""
    answer = client.post("/api/trace", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415


def test_large_bodies_are_refused(client: TestClient) -> None:
    assert client.post("/api/trace", json={"prompt": "x" * 200_000}).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(300):
            yield b"x" * 1000
        yield b'"}'

    chunked: Any = client.post(
        "/api/trace", content=chunks(), headers={"content-type": "application/json"}
    )
    assert chunked.status_code in (400, 413)


def test_the_browser_may_load_only_our_files(client: TestClient) -> None:
    for path in ("/", "/static/trace.js", "/nothing", "/api/queue", "/api/nothing"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
    refused = client.get("/", headers={"host": "evil.example"})
    assert "default-src 'none'" in refused.headers["content-security-policy"]


def test_the_report_has_the_same_headers_and_its_own_script_alone(client: TestClient) -> None:
    answer = client.get("/report")
    assert answer.status_code == 200
    script = re.search("<script>(.*?)</script>", answer.text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = answer.headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}';" in policy
    for rule in ("default-src 'none'", "frame-ancestors 'none'", "form-action 'none'",
                 "require-trusted-types-for 'script'"):  # fmt: skip
        assert rule in policy
    page = client.get("/").headers
    for name in HEADERS:
        if name != "content-security-policy":
            assert answer.headers[name] == page[name]


def test_preflights_get_no_permission(client: TestClient) -> None:
    answer = client.options(
        "/api/trace",
        headers={
            "origin": "http://evil.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "x-rldecoder-token",
        },
    )
    assert answer.is_error
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static/", "/static",
        "/static/%2fetc%2fpasswd", "/static/app.py", "/static/page.html.j2", "/static/%00",
        "/report/../reviews.jsonl", "/docs", "/openapi.json", "/redoc", "/reviews.jsonl",
    ],
)  # fmt: skip
def test_nothing_but_named_files_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "There is nothing here." in answer.text
    assert answer.headers["content-type"].startswith("text/html")


def test_hosts_are_compared_without_their_port(client: TestClient) -> None:
    assert HOST.endswith(":8760")
    assert client.get("/", headers={"host": "127.0.0.1:70:80"}).status_code == 421
