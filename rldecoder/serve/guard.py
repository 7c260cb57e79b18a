"""What stands before every request: who may ask, how much, and what the browser may do with it.

The server listens on the loopback and has no login, so that any page in the user's browser can
send requests to it. Four things keep those out: the Host header must be one of ours (DNS
rebinding), what another page asks for is refused (Origin, Sec-Fetch-Site; a link to a page of ours
may be followed), a POST must carry the token that only our own page holds (CSRF), and the browser
is told to load and run nothing but our own files.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rldecoder.serve.pages import error_response

TOKEN_HEADER = "x-rldecoder-token"
PAGES = ("/", "/report")
MAX_BODY_BYTES = 128 * 1024
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The report is one page that loads nothing, with its styles, figures and one script in it."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware: refuses what is not ours, bounds bodies, sets the security headers.

    Args:
        hosts: names under which browsers may reach the server, without port. The port is not
            compared: behind an SSH tunnel it is another one.
        token: what every POST must carry.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str) -> None:
        self.app = app
        self.hosts = frozenset(host.lower() for host in hosts)
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, what, why, mend = refusal
            answer = error_response(scope["path"], status, what, why, mend)
            await answer(scope, receive, send_with_headers)
            return
        await self.app(scope, _bounded(receive), send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str, str, str] | None:
        host = headers.get("host", "")
        if _name(host) not in self.hosts:
            return (
                421,
                "This server does not answer under that name.",
                "Another name may be a trick by which a web page reaches it (DNS rebinding).",
                "Open the address that `rldecoder serve` printed.",
            )
        if not scope["path"].startswith("/"):  # a proxy's form, which names a host of its own
            return 400, "The address is not a path on this server.", "", ""

        origins = headers.getlist("origin")
        if any(origin not in (f"http://{host}", f"https://{host}") for origin in origins):
            return _FOREIGN
        site = headers.get("sec-fetch-site", "same-origin")
        if site not in ("same-origin", "none") and not _follows_a_link(scope, headers):
            return _FOREIGN

        # From here on: questions and verdicts, which only our own page may send.
        if scope["method"] in ("GET", "HEAD"):
            return None
        if not origins:
            return _FOREIGN
        if not hmac.compare_digest(headers.get(TOKEN_HEADER, "").encode(), self.token.encode()):
            return (
                403,
                "The request does not carry this server's token.",
                "The page is older than the server: it was restarted since.",
                "Reload the page.",
            )

        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "The body is not JSON.", "", "Send application/json."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return 413, "The request is too large.", f"At most {MAX_BODY_BYTES:,} bytes.", ""
        return None


def _follows_a_link(scope: Scope, headers: Headers) -> bool:
    """Whether a browser opens one of our pages in a tab, not in a frame, at another page's link."""
    return (
        scope["method"] == "GET"
        and scope["path"] in PAGES
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest", "document") == "document"
    )


_FOREIGN = (
    403,
    "The request does not come from this server's own page.",
    "Other pages may not use it.",
    "Open the address that `rldecoder serve` printed.",
)


def _bounded(receive: Receive) -> Receive:
    """Bodies sent in chunks have no announced length: they are counted, and cut off."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            # To the application it looks like a client that went away in mid-sentence.
            return {"type": "http.disconnect"}
        return message

    return counted


def _name(host: str) -> str:
    """The Host header without its port, in lower case."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and (port.isdecimal() or not port) else host.lower()
