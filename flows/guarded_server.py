"""Prefect's server behind a guard: own name, own pages, the password, and no foreign commands.

Any page in the user's browser can send requests to a server on the loopback, and what this one is
told is run by its worker. So a request must name this server (Host: DNS rebinding), come from one
of its own pages or from no page (Origin, Sec-Fetch-Site; websockets too), and carry the password,
which a browser never adds by itself: Prefect's page keeps it in the storage of its own origin, and
sends it in a header. Prefect checks the password again behind the guard, its CSRF token too.

What is let in by all this may still not say what the worker executes: see `flows.commands`.

`LocalServer` runs this module: uvicorn, with limits on how long a client may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.commands import Pairs, foreign_command, plain
from flows.form_check import unusable
from flows.listening import is_deaf
from flows.password import authorization
from rldecoder.serve.patience import PatientProtocol

MAX_BODY_BYTES = 32 * 1024 * 1024
BODY_SECONDS = 25.0
"""How long a request's body, or a websocket's first message, may take."""
REQUEST_SECONDS = 30.0
"""How long a whole request may take, from the connection, or its first byte, to its last; one
that is slower than that is dropped without an answer."""
MAX_CONNECTIONS = 512
"""One more takes the place of the one that has been without a question for longest. (1,024 open
files are the usual limit.)"""
LOGIN_PATH = "/rldecoder/login"
CODE_PATH = "/rldecoder/code"
CODE_SECONDS = 900.0
OPEN_PATHS = ("/api/health", "/api/ready", LOGIN_PATH)
"""Answered without the password: whether the server runs, and the way in."""

_READS = ("GET", "HEAD")
# Prefect's pages carry styles of their own in their markup, and start workers from blobs. PixiJS,
# which draws the graph of a run, compiles code from strings and draws nothing where it may not.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' "
    "blob:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

_LOGIN_SCRIPT = """
const code = location.hash.slice(1);
history.replaceState(null, "", location.pathname);
(async () => {
  const answer = code ? await fetch(location.pathname, {
    method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify({code}),
  }) : null;
  if (answer && answer.ok) {
    localStorage.setItem("prefect-password", (await answer.json()).password);
    location.replace("/");
  } else {
    document.getElementById("refused").hidden = false;
  }
})();
"""
_LOGIN_PAGE = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>RL-Decoder: login</title>
<body style="font: 1rem/1.5 system-ui; max-width: 40rem; margin: 4rem auto; padding: 0 1rem">
<h1>RL-Decoder</h1>
<div id="refused" hidden>
<p>This link lets nobody in: it was used before, is too old, or lacks its code.</p>
<p>In the project's folder, <code>.venv/bin/python -m flows.serve_ui --login</code> prints a new
one. Or open <a href="/">the page</a> and paste the content of the file
<code>ui-password</code> of the Prefect home (<code>.prefect</code>).</p>
</div>
<noscript><p>This page needs JavaScript.</p></noscript>
<script>{_LOGIN_SCRIPT}</script>
"""
_LOGIN_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; script-src 'sha256-"
    + b64encode(hashlib.sha256(_LOGIN_SCRIPT.encode()).digest()).decode()
    + "'"
)


@dataclass
class Codes:
    """One-time codes for the login page. They die with the server, with time, and with use."""

    now: Callable[[], float] = time.monotonic
    _until: dict[str, float] = field(default_factory=dict)

    def new(self) -> str:
        """A code that works once, and not for long."""
        self._until = {c: until for c, until in self._until.items() if until > self.now()}
        code = secrets.token_urlsafe(24)
        self._until[code] = self.now() + CODE_SECONDS
        return code

    def take(self, code: object) -> bool:
        """Whether the code is good; it is not any more."""
        return isinstance(code, str) and self._until.pop(code, 0.0) > self.now()


class _TooSlow(Exception):
    pass


class _TooLarge(Exception):
    pass


class Guard:
    """ASGI middleware: see the module.

    Args:
        app: Prefect's application.
        port: where the server listens on 127.0.0.1.
        password: what every request to the API must carry.
    """

    def __init__(self, app: ASGIApp, *, port: int, password: str) -> None:
        self.app = app
        self._port = port
        self._hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        self._password = password
        self._authorization = authorization(password).encode()
        self._codes = Codes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._stranger(scope, headers)
        if scope["type"] == "websocket":
            if refusal is None:
                # Prefect asks for the password in the first message.
                await self.app(scope, _first_message_in_time(receive), send)
            else:
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": "not your server"})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                policy = _API_POLICY if _is_api(scope["path"]) else _PAGE_POLICY
                answered.setdefault("content-security-policy", policy)
                for name, value in _HEADERS.items():
                    answered.setdefault(name, value)
            await send(message)

        if refusal is None:
            refusal = self._without_password(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        if scope["method"] in (*_READS, "OPTIONS"):
            own = self._own_page(scope, headers)
            await (own or self.app)(scope, receive, send_with_headers)
            return
        try:
            body = await _whole_body(receive, headers)
        except _TooSlow:
            refusal = refused(408, "The request's body does not arrive.", "", "Send it again.")
        except _TooLarge:
            what = f"The request is larger than {MAX_BODY_BYTES:,} bytes."
            refusal = refused(413, what, "", "Send less at once.")
        else:
            refusal = self._on_content(scope, body)
            receive = _replayed(body, receive)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _stranger(self, scope: Scope, headers: Headers) -> Response | None:
        """Why this request may not come from one of our pages or programs, or None."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return refused(
                421,
                "This server does not answer under that name.",
                "Another name may be a trick by which a web page reaches it (DNS rebinding).",
                f"Use http://127.0.0.1:{self._port}; through a tunnel, with the same port.",
            )

        origins = headers.getlist("origin")
        foreign = any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins)
        site = headers.get("sec-fetch-site", "same-origin")
        if not foreign and site not in ("same-origin", "none"):
            # A link on another page may lead here; nothing else there may.
            foreign = not (
                scope["type"] == "http"
                and scope["method"] == "GET"
                and headers.get("sec-fetch-mode") == "navigate"
                and headers.get("sec-fetch-dest") == "document"
                and not scope["path"].startswith("/api")
            )
        if foreign:
            return refused(
                403,
                "The request does not come from this server's own page.",
                "Other pages may not use it.",
                f"Open http://127.0.0.1:{self._port}.",
            )
        return None

    def _without_password(self, scope: Scope, headers: Headers) -> Response | None:
        path, reads = scope["path"], scope["method"] in _READS
        if path in OPEN_PATHS and (reads or path == LOGIN_PATH):
            return None
        if reads and not _is_api(path) and not path.startswith("/rldecoder"):
            return None  # the pages themselves, which hold nothing of the user's
        given = headers.get("authorization", "").encode()
        if hmac.compare_digest(given, self._authorization):
            return None
        return refused(
            401,
            "The request does not carry this server's password.",
            "",
            "Open the link of `python -m flows.serve_ui --login`; programs set "
            "PREFECT_API_AUTH_STRING to the content of ui-password in the Prefect home.",
        )

    def _own_page(self, scope: Scope, headers: Headers) -> Response | None:
        """Pages that are not Prefect's."""
        if scope["path"] == LOGIN_PATH:
            return HTMLResponse(_LOGIN_PAGE, headers={"content-security-policy": _LOGIN_POLICY})
        if headers.get("host", "").startswith("localhost") and not scope["path"].startswith("/api"):
            # Prefect's page asks 127.0.0.1, which for a page of `localhost` is another server.
            target = scope["path"].lstrip("/")
            return RedirectResponse(f"http://127.0.0.1:{self._port}/{target}")
        return None

    def _on_content(self, scope: Scope, body: bytes) -> Response | None:
        """The answer to our own requests, and to those whose content is refused."""
        try:
            content: Any = json.loads(body, object_pairs_hook=Pairs) if body else None
        except (ValueError, RecursionError):
            return refused(415, "The request's body is not JSON.", "", "Send application/json.")

        # Our own two requests: the login, and a new code for it.
        if scope["path"] == LOGIN_PATH:
            pairs = dict(content) if isinstance(content, Pairs) else {}
            if not self._codes.take(pairs.get("code")):
                return refused(403, "The code is not good, or not any more.", "", "")
            given = authorization(self._password).removeprefix("Basic ")
            return JSONResponse({"password": given}, headers={"cache-control": "no-store"})
        if scope["path"] == CODE_PATH:
            return JSONResponse({"code": self._codes.new()}, headers={"cache-control": "no-store"})

        # What Prefect would take and must not: it would be lost, or run a stranger's command.
        if _answers_the_deaf(scope["path"]):
            return refused(
                409,
                "Nobody would hear this answer.",
                "The review was started from Python, and its process is gone.",
                "Start the review again: it asks this question anew.",
            )
        try:
            complaint = foreign_command(scope["path"], content)
        except RecursionError:
            complaint = "The request is nested too deeply."
        if complaint is None:
            wrong = unusable(scope["path"], plain(content))
            return None if wrong is None else refused(422, wrong.what, wrong.why, wrong.mend)
        return refused(
            403,
            complaint,
            "This server runs the flows of prefect.yaml, as they are, and no other command.",
            "Change settings with the form's `overrides`, or start your own command yourself.",
        )


def _is_api(path: str) -> bool:
    return path == "/api" or path.startswith("/api/")


def _answers_the_deaf(path: str) -> bool:
    """Whether this is the answer to a form whose process is gone."""
    parts = path.strip("/").split("/")
    return parts[:2] == ["api", "flow_runs"] and parts[3:] == ["resume"] and is_deaf(parts[2])


def refused(status: int, what: str, why: str, mend: str) -> Response:
    """An answer that Prefect's page and its programs know how to show."""
    said = " ".join(part for part in (what, why, mend) if part)
    return JSONResponse({"detail": said, "exception_message": said}, status_code=status)


async def _whole_body(receive: Receive, headers: Headers) -> bytes:
    announced = headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > MAX_BODY_BYTES:
        raise _TooLarge
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _TooSlow
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY_BYTES:
                    raise _TooLarge
    except TimeoutError:
        raise _TooSlow from None
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _first_message_in_time(receive: Receive) -> Receive:
    seen = 0

    async def timed() -> Message:
        nonlocal seen
        seen += 1
        if seen != 2:  # the first is the connection itself
            return await receive()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await receive()
        except TimeoutError:
            return {"type": "websocket.disconnect", "code": 1008}

    return timed


class PrefectProtocol(PatientProtocol):
    """HTTP/1.1 for Prefect's clients, pages and websockets; none of them may take for ever."""

    request_seconds = REQUEST_SECONDS
    max_connections = MAX_CONNECTIONS


def make_server(app: ASGIApp, port: int) -> uvicorn.Server:
    """A server of 127.0.0.1 for an application behind the guard."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=port,
            http=PrefectProtocol,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
        )
    )


def main() -> None:
    """Serve Prefect's application behind the guard; port and password come from its settings."""
    from prefect.server.api.server import create_app as create_prefect

    port = int(os.environ["PREFECT_SERVER_API_PORT"])
    password = os.environ["PREFECT_SERVER_API_AUTH_STRING"]
    server = make_server(Guard(create_prefect(), port=port, password=password), port)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(3)  # as uvicorn's own command does


if __name__ == "__main__":
    main()
