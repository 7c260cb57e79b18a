"""Who may use the server of `make ui`, and what it refuses from everybody."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosedOK
from websockets.sync.client import connect

from flows import guarded_server
from flows.guarded_server import (
    CODE_SECONDS,
    MAX_BODY_BYTES,
    Codes,
    Guard,
    PrefectProtocol,
    make_server,
)
from flows.local_server import free_port
from flows.password import authorization
from tests.flows.ui_client import FAKE_KEYS, ROOT, Ui
from tests.serve.test_sockets import dropped_after

PORT = 4242
OWN = f"http://127.0.0.1:{PORT}"
LOGIN = {"authorization": authorization("secret")}
RUN = "/api/deployments/x/create_flow_run"
EVIL = {"job_variables": {"command": "touch /tmp/x"}}


class Behind:
    """What stands behind the guard; it keeps what reached it."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, str, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say yes to everything."""
        if scope["type"] == "websocket":
            socket = WebSocket(scope, receive, send)
            await socket.accept()
            self.reached.append(("WS", scope["path"], (await socket.receive_text()).encode()))
            await socket.close()
            return
        body = (await receive()).get("body", b"")
        self.reached.append((scope["method"], scope["path"], body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def behind() -> Behind:
    return Behind()


@pytest.fixture
def guard(behind: Behind) -> TestClient:
    guard = Guard(behind, port=PORT, password="secret")
    return TestClient(guard, base_url=OWN, follow_redirects=False)


FOREIGN = [
    {"host": "evil.example"},
    {"host": f"evil.example:{PORT}"},
    {"host": "127.0.0.1"},
    {"host": "127.0.0.1:8000"},
    {"host": f"127.0.0.1.evil.example:{PORT}"},
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:8000"},
    {"origin": f"http://localhost:{PORT}"},  # another origin than 127.0.0.1's
    {"origin": f"https://127.0.0.1:{PORT}"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},  # a page of another port of this machine
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/api/health"), ("POST", RUN), ("OPTIONS", RUN),
     ("POST", "/rldecoder/login")],
)  # fmt: skip
def test_no_other_page_reaches_it(
    guard: TestClient, behind: Behind, headers: dict[str, str], method: str, path: str
) -> None:
    answer = guard.request(method, path, headers=LOGIN | headers)
    assert answer.status_code in (403, 421)
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert behind.reached == []


@pytest.mark.parametrize("headers", FOREIGN)
def test_no_other_page_opens_a_websocket(
    guard: TestClient, behind: Behind, headers: dict[str, str]
) -> None:
    with (
        pytest.raises(WebSocketDisconnect),
        guard.websocket_connect("/api/events/in", headers=headers) as opened,
    ):
        opened.send_text("hello")
        opened.receive_text()
    assert behind.reached == []


@pytest.mark.parametrize(
    "headers",
    [{}, {"origin": OWN, "sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"},
     {"host": f"localhost:{PORT}", "origin": f"http://localhost:{PORT}"}],
)  # fmt: skip
def test_its_own_pages_and_programs_do(
    guard: TestClient, behind: Behind, headers: dict[str, str]
) -> None:
    sent = b'{"parameters": {}}'
    answer = guard.post(RUN, content=sent, headers=LOGIN | headers)
    assert answer.status_code == 200
    assert behind.reached == [("POST", RUN, sent)]
    assert answer.headers["x-frame-options"] == "DENY"  # no other page shows it in a frame
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_only_the_pages_may_compile_code_from_strings(guard: TestClient) -> None:
    name = "content-security-policy"
    pages = guard.get("/runs").headers[name].split("; ")
    assert "script-src 'self' 'unsafe-eval'" in pages
    assert "connect-src 'self'" in pages
    assert guard.get("/api/health").headers[name].startswith("default-src 'none'; ")
    assert "unsafe-eval" not in guard.get("/rldecoder/login").headers[name]


def test_a_link_elsewhere_may_lead_to_its_pages(guard: TestClient) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    link["sec-fetch-dest"] = "document"
    assert guard.get("/runs", headers=link).status_code == 200
    assert guard.get("/api/flows", headers=LOGIN | link).status_code == 403
    other = guard.get("/runs", headers={"host": f"localhost:{PORT}"})
    assert other.headers["location"] == f"{OWN}/runs"


@pytest.mark.parametrize(
    "header", [None, "", "Basic", authorization("guess"), authorization(""), "Bearer secret",
               "Basic \xe4"],
)  # fmt: skip
def test_the_api_asks_for_the_password(
    guard: TestClient, behind: Behind, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for method, path in [
        ("GET", "/api/flows/1"), ("POST", RUN), ("DELETE", "/api/flows/1"), ("GET", "/api/"),
        ("POST", "/api/health"), ("POST", "/rldecoder/code"), ("PUT", "/"),
    ]:  # fmt: skip
        assert guard.request(method, path, headers=headers).status_code == 401
    assert behind.reached == []
    assert guard.get("/api/health").status_code == 200


def test_a_code_lets_a_browser_in_once(guard: TestClient) -> None:
    page = guard.get("/rldecoder/login")
    assert "secret" not in page.text
    code = guard.post("/rldecoder/code", headers=LOGIN, json={}).json()["code"]
    assert guard.post("/rldecoder/login", json={"code": "x"}).status_code == 403
    given = guard.post("/rldecoder/login", json={"code": code}).json()["password"]
    assert f"Basic {given}" == LOGIN["authorization"]
    for wrong in ({"code": code}, {"code": None}, {"code": [code]}, {}, [], None):
        assert guard.post("/rldecoder/login", json=wrong).status_code == 403


def test_a_code_does_not_last() -> None:
    now = [0.0]
    codes = Codes(now=lambda: now[0])
    first, second = codes.new(), codes.new()
    now[0] = CODE_SECONDS - 1
    assert codes.take(first)
    now[0] = CODE_SECONDS + 1
    assert not codes.take(second)


TEMPLATE = {"job_configuration": {"command": "touch /tmp/x"}, "variables": {}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RUN, EVIL),
        (RUN, {"job_variables": {"image": "evil"}}),
        (RUN, {"job_variables": {"env": {"PATH": "/tmp"}}}),
        (RUN, {"job_variables": {"working_dir": "/tmp"}}),
        (RUN, {"job_variables": {"stream_output": "{{ prefect.blocks.secret.x }}"}}),
        (RUN, {"job_variables": [["command", "x"]]}),
        (RUN + "/bulk", [{}, EVIL]),
        ("/api/flow_runs/", EVIL),
        ("/api/flow_runs/x", EVIL),
        ("/api/flow_runs/", {"infrastructure_document_id": "0" * 32}),
        ("/api/automations/", {"actions": [{"type": "run-deployment", **EVIL}]}),
        ("/api/automations/x", {"actions_on_trigger": [{"a": {"b": EVIL}}]}),
        ("/api/deployments/", {"infra_overrides": {"command": "x"}}),
        ("/api/deployments/", {"entrypoint": "evil.py:flow"}),
        ("/api/deployments/x", {"entrypoint": "/tmp/flows/pipeline.py:pipeline"}),
        ("/api/deployments/x", {"entrypoint": ["flows/pipeline.py:pipeline"]}),
        ("/api/deployments/", {"pull_steps": [{"prefect.deployments.steps.run_shell_script": {}}]}),
        ("/api/deployments/x", {"path": "/tmp"}),
        ("/api/deployments/x", {"storage_document_id": "0" * 32}),
        ("/api/work_pools/", {"name": "other", "base_job_template": TEMPLATE}),
        ("/api/work_pools/local", {"base_job_template": TEMPLATE}),
    ],
)
def test_nobody_changes_what_the_worker_executes(
    guard: TestClient, behind: Behind, path: str, body: Any
) -> None:
    for method in ("POST", "PATCH", "PUT"):
        answer = guard.request(method, path, headers=LOGIN, json=body)
        assert answer.status_code == 403
        assert "no other command" in answer.json()["detail"]
    twice = json.dumps(body)[:-1] + ', "job_variables": {}, "entrypoint": null}'
    if isinstance(body, dict):  # of a name that comes twice, both values count
        assert guard.post(path, headers=LOGIN, content=twice).status_code == 403
        wide = json.dumps(body).encode("utf-16")
        assert guard.post(path, headers=LOGIN, content=wide).status_code == 403
    assert behind.reached == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RUN, {"job_variables": None}),
        (RUN, {"job_variables": {"stream_output": False, "labels": {"a": "b"}, "name": "n"}}),
        ("/api/deployments/", {"entrypoint": "flows/pipeline.py:pipeline", "path": str(ROOT)}),
        ("/api/deployments/x", {"pull_steps": [
            {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]}),
        ("/api/work_pools/", {"name": "local", "base_job_template": {}}),
        ("/api/block_documents/", {"data": {"path": "/tmp"}}),
    ],
)  # fmt: skip
def test_what_changes_no_command_passes(guard: TestClient, path: str, body: Any) -> None:
    assert guard.post(path, headers=LOGIN, json=body).status_code == 200


def test_bodies_are_bounded(
    guard: TestClient, behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guard.post(RUN, headers=LOGIN, content=b"not json").status_code == 415
    assert guard.post(RUN, headers=LOGIN, content=b"[" * 100_000).status_code == 415
    announced = {"content-length": str(MAX_BODY_BYTES + 1)}
    assert guard.post(RUN, headers=LOGIN | announced, content=b"").status_code == 413
    monkeypatch.setattr(guarded_server, "MAX_BODY_BYTES", 10)
    in_chunks = iter([b'"' + b"x" * 8, b"x" * 8 + b'"'])
    assert guard.post(RUN, headers=LOGIN, content=in_chunks).status_code == 413
    assert behind.reached == []


def test_a_body_that_never_comes_is_not_waited_for(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_server, "BODY_SECONDS", 0.01)
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", f"127.0.0.1:{PORT}".encode())]
    headers.append((b"authorization", LOGIN["authorization"].encode()))
    scope = {"type": "http", "method": "POST", "path": RUN, "headers": headers}
    asyncio.run(Guard(behind, port=PORT, password="secret")(scope, never, send))
    assert sent[0]["status"] == 408
    assert behind.reached == []


@pytest.mark.slow
def test_the_running_server_lets_no_stranger_in(ui: Ui) -> None:
    """Also where only Prefect itself would look: nothing is accepted, nothing may be read."""
    deployment = ui.deployment("pipeline/pipeline-debug")
    path = f"/api/deployments/{deployment['id']}/create_flow_run"
    count = len(ui.flow_runs())
    own = {**ui.login, **ui.csrf}
    strangers = [
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://evil.example", **own},
        {"Host": "evil.example", **own},
        {"Content-Type": "text/plain"},
        {"Content-Type": "text/plain", "Origin": "null"},
        {"Authorization": "Basic Og=="},
        dict(ui.csrf),
        dict(ui.login),  # a CSRF token is asked for besides
    ]
    with httpx.Client(base_url=ui.origin, trust_env=False, timeout=60) as client:
        for headers in strangers:
            for body in ({}, EVIL):
                answer = client.post(path, headers=headers, content=json.dumps(body))
                assert answer.status_code in (401, 403, 421), (headers, answer.text)
                assert "access-control-allow-origin" not in answer.headers
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        answer = client.options(path, headers=asked)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
        read = client.get("/api/admin/version")
        assert read.status_code == 401
        evil = client.post(path, headers=own, json=EVIL)
        assert evil.status_code == 403
        assert "job variables" in evil.json()["detail"]
    assert len(ui.flow_runs()) == count
    assert handshake(ui, None) == 101
    assert handshake(ui, "http://evil.example") == 403


def handshake(ui: Ui, origin: str | None) -> int:
    """The status that a websocket's opening gets, by hand."""
    port = int(ui.origin.rpartition(":")[2])
    lines = [
        "GET /api/events/in HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket",
        "Connection: Upgrade", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: prefect",
    ]  # fmt: skip
    if origin is not None:
        lines.append(f"Origin: {origin}")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as opened:
        opened.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        return int(opened.recv(4096).split()[1])


@pytest.mark.slow
def test_the_password_is_in_no_log_and_on_no_command_line(ui: Ui) -> None:

    written = [path.read_bytes() for path in ui.home.rglob("*") if path.is_file()]
    assert not [key for key in FAKE_KEYS.values() if any(key.encode() in b for b in written)]
    holders = [path.name for path in ui.home.rglob("*") if path.is_file()
               and ui.password.encode() in path.read_bytes()]  # fmt: skip
    assert holders == ["ui-password"]
    assert (ui.home / "ui-password").stat().st_mode & 0o777 == 0o600
    lines = []
    for process in psutil.process_iter(["cmdline"]):
        lines += process.info["cmdline"] or []
    assert not [line for line in lines if ui.password in line]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a running server whose clients have half a second for a request."""
    port = free_port()
    monkeypatch.setattr(PrefectProtocol, "request_seconds", 0.5)
    server = make_server(Guard(Behind(), port=port, password="secret"), port)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join()


SLOW = {
    "nothing": (b"", b""),
    "half a line": (b"GET /api/hea", b""),
    "headers": (b"GET /api/health HTTP/1.1\r\nHost: {own}\r\n", b"X-A: b\r\n"),
    "one header": (b"GET /api/health HTTP/1.1\r\nHost: {own}\r\nX: ", b"y"),
    "body": (b"POST " + RUN.encode() + b" HTTP/1.1\r\nHost: {own}\r\nAuthorization: {login}\r\n"
             b"Content-Length: 5000\r\n\r\n", b"x"),
    "body of a stranger": (b"POST / HTTP/1.1\r\nHost: evil\r\nContent-Length: 5000\r\n\r\n", b"x"),
    "chunks": (b"POST " + RUN.encode() + b" HTTP/1.1\r\nHost: {own}\r\nAuthorization: {login}\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "second request": (b"GET /api/health HTTP/1.1\r\nHost: {own}\r\n\r\nGET / HT", b"T"),
    "half an upgrade": (b"GET /api/events/in HTTP/1.1\r\nHost: {own}\r\nUpgrade: websocket\r\n"
                        b"Connection: Upgrade\r\n", b"X-A: b\r\n"),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "drip"), SLOW.values(), ids=SLOW.keys())
def test_slow_clients_are_dropped(impatient: int, sent: bytes, drip: bytes) -> None:
    sent = sent.replace(b"{own}", f"127.0.0.1:{impatient}".encode())
    sent = sent.replace(b"{login}", LOGIN["authorization"].encode())
    with socket.create_connection(("127.0.0.1", impatient)) as line:
        line.sendall(sent)
        assert 0.3 < dropped_after(line, drip) < 5


def test_who_is_not_slow_keeps_a_connection_and_a_websocket(impatient: int) -> None:
    own = f"127.0.0.1:{impatient}"
    with socket.create_connection(("127.0.0.1", impatient), timeout=5) as line:
        for _ in range(2):
            line.sendall(f"HEAD /api/health HTTP/1.1\r\nHost: {own}\r\n\r\n".encode())
            assert line.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.7)  # longer than a request may take
    with connect(f"ws://{own}/api/events/in") as opened:
        time.sleep(0.7)
        opened.send("hello")
        with pytest.raises(ConnectionClosedOK):
            opened.recv(5)
