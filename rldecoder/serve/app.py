"""The FastAPI application: a page, its files, and the questions it asks."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection
from typing import Annotated, NamedTuple, TypeVar

import anyio
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.status import HTTP_422_UNPROCESSABLE_CONTENT

from rldecoder.dashboard.cards import ReviewShown
from rldecoder.dashboard.report import script_sha256
from rldecoder.dashboard.shown import ExampleShown
from rldecoder.errors import BadInputError, RlDecoderError
from rldecoder.serve import pages
from rldecoder.serve.answers import (
    FeatureAnswer,
    InterventionAnswer,
    PositionAnswer,
    QueueAnswer,
    SearchAnswer,
    TraceAnswer,
)
from rldecoder.serve.catalogue import Catalogue
from rldecoder.serve.guard import LOOPBACK, REPORT_POLICY, Guard
from rldecoder.serve.requests import (
    FeatureQuery,
    InterventionRequest,
    PositionRequest,
    PromptRequest,
    ReviewRequest,
)
from rldecoder.serve.workbench import Workbench

_log = logging.getLogger(__name__)

MAX_WAITING = 4
"""Questions to the model that may wait behind the one being answered; more are turned away."""
QUEUE_SHOWN = 10
Answer = TypeVar("Answer")


class BusyError(RlDecoderError):
    """Too many questions wait already."""


class Served(NamedTuple):
    """What a server serves."""

    workbench: Workbench
    catalogue: Catalogue
    facts: pages.PageFacts
    report: bytes | None
    """`report.html` of the run as it was published, where it is."""


class OneAtATime:
    """Runs work in a thread, one piece at a time: it fills all cores, and the models' hooks are
    not made for two."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._inside = 0  # counted here: anyio's own count of those that wait lags behind a burst
        self._limiter: anyio.CapacityLimiter | None = None

    async def run(self, work: Callable[[], Answer]) -> Answer:
        """The result of `work`.

        Raises:
            BusyError: too many wait already.
        """
        if self._limiter is None:  # it belongs to the event loop that serves
            self._limiter = anyio.CapacityLimiter(1)
        if self._inside > self.max_waiting:
            raise BusyError(
                "The server is busy.",
                f"{self.max_waiting} questions are waiting for the model already.",
                "Try again in a moment.",
            )
        self._inside += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._inside -= 1


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
    model = OneAtATime(max_waiting)
    _add_questions(app, served.workbench, model)
    _add_features(app, served.catalogue, served.workbench, model)
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


def _add_questions(app: FastAPI, bench: Workbench, model: OneAtATime) -> None:
    @app.post("/api/trace")
    async def trace(request: PromptRequest) -> TraceAnswer:
        found = await model.run(lambda: bench.read(request.prompt).predictions)
        return TraceAnswer.model_validate({"tokens": found})

    @app.post("/api/position")
    async def position(request: PositionRequest) -> PositionAnswer:
        found = await model.run(lambda: bench.read(request.prompt).features(request.position))
        return PositionAnswer.of(found)

    @app.post("/api/intervene")
    async def intervene(request: InterventionRequest) -> InterventionAnswer:
        found = await model.run(
            lambda: bench.read(request.prompt).amplify(
                request.latent, request.factor, request.position
            )
        )
        return InterventionAnswer.of(found, request.latent)

    @app.post("/api/explain")
    async def explain(request: PositionRequest) -> ExampleShown:
        found = await model.run(lambda: bench.read(request.prompt).explain(request.position))
        return ExampleShown.of(found)


def _add_features(app: FastAPI, catalogue: Catalogue, bench: Workbench, model: OneAtATime) -> None:
    @app.get("/api/features")
    def features(query: Annotated[FeatureQuery, Query()]) -> SearchAnswer:
        return catalogue.search(query)

    @app.get("/api/features/{latent}")
    async def feature(latent: int) -> FeatureAnswer:
        # Only the most important latents are labelled; of the others the decoder's row is known.
        if not catalogue.has(latent):
            raised, lowered = await model.run(lambda: bench.reader.row_effects(latent))
            said = catalogue.said(latent)
            return FeatureAnswer(shown=said, promoted=raised, suppressed=lowered)
        return FeatureAnswer(card=await anyio.to_thread.run_sync(catalogue.card, latent))

    @app.get("/api/queue")
    def queue(count: Annotated[int, Query(ge=1, le=5000)] = QUEUE_SHOWN) -> QueueAnswer:
        return catalogue.queue(count)

    @app.post("/api/reviews", status_code=201)
    def review(request: ReviewRequest) -> ReviewShown:
        return catalogue.review(request)


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
