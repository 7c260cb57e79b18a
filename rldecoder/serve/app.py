"""The FastAPI application: a page, its files, and the questions it asks."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.status import HTTP_422_UNPROCESSABLE_CONTENT

from rldecoder.dashboard.report import script_sha256
from rldecoder.errors import BadInputError, RlDecoderError
from rldecoder.serve import pages
from rldecoder.serve.guard import LOOPBACK, REPORT_POLICY, Guard
from rldecoder.serve.questions import add_catalogue, add_questions
from rldecoder.serve.served import Served
from rldecoder.serve.turns import MAX_WAITING, BusyError, OneAtATime

_log = logging.getLogger(__name__)


def make_app(
    served: Served,
    *,
    hosts: Collection[str] = LOOPBACK,
    token: str | None = None,
    max_waiting: int = MAX_WAITING,
) -> Guard:
    """The whole application, guard included.

    Args:
        hosts: names under which browsers may reach it.
        token: secret of this server's pages; None draws one.
        max_waiting: see MAX_WAITING.
    """
    token = token or secrets.token_urlsafe(32)
    # No generated documentation: its pages load scripts from elsewhere.
    app = FastAPI(title="RL-Decoder", docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_pages(app)
    _add_pages(app, served, token)
    add_questions(app, served, OneAtATime(max_waiting))
    add_catalogue(app, served)
    return Guard(app, hosts=hosts, token=token)


def _add_pages(app: FastAPI, served: Served, token: str) -> None:
    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(pages.main_page(served.facts, token))

    @app.get("/static/{name}")
    def file(name: str) -> Response:
        try:
            content, media_type = pages.asset(name)
        except KeyError:
            raise HTTPException(404) from None
        return Response(content, media_type=media_type)

    @app.get("/report")
    def report() -> HTMLResponse:
        if served.report is None:
            raise HTTPException(404)
        # Its one script lies in the page: it may run if it is the one that we ship.
        policy = {"content-security-policy": REPORT_POLICY.format(script=script_sha256())}
        return HTMLResponse(served.report, headers=policy)


def _add_error_pages(app: FastAPI) -> None:
    @app.exception_handler(RlDecoderError)
    async def ours(request: Request, error: RlDecoderError) -> Response:
        status = 503 if isinstance(error, BusyError) else 400
        if not isinstance(error, BusyError | BadInputError):
            _log.error("%s", error)
            status = 500
        return pages.error_response(request.url.path, status, error.what, error.why, error.mend)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'][1:]) or 'body'}: {item['msg']}"
            for item in error.errors()[:5]
        )
        return pages.error_response(
            request.url.path,
            HTTP_422_UNPROCESSABLE_CONTENT,
            "The request cannot be used.",
            problems,
            "",
        )

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        default = {404: "There is nothing here.", 405: "This cannot be done here."}
        own = isinstance(error.detail, str) and error.detail.endswith(".")
        what = error.detail if own else default.get(error.status_code, "That did not work.")
        return pages.error_response(request.url.path, error.status_code, what, "", "")

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        # Starlette logs the traceback; the browser learns nothing of the machine's insides.
        return pages.error_response(
            request.url.path,
            500,
            "The server made a mistake.",
            f"{type(error).__name__}; the terminal that runs it says more.",
            "Try again, and please report it if it stays.",
        )
