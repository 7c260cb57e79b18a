"""The HTTP server as `rldecoder serve` runs it: loopback manners, limits, inert log lines."""

from __future__ import annotations

import logging

import uvicorn

from rldecoder.serve.guard import Guard
from rldecoder.serve.patience import MAX_CONNECTIONS, PatientProtocol
from rldecoder.terminal import PrintableFormatter

KEEP_ALIVE_SECONDS = 10
"""Between two requests on one connection."""
SHUTDOWN_SECONDS = 5
"""For answers that are under way at Ctrl-C."""


def make_server(app: Guard) -> uvicorn.Server:
    """A server for `make_app`, to be run on a socket that listens already."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=PatientProtocol,
            log_config=None,
            log_level=_quiet_log(),
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="off",
            # The protocol itself makes room; this would turn away those whom it lets in.
            limit_concurrency=2 * MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )


def _quiet_log() -> int:
    """Only warnings, on stderr, in characters that no terminal acts on (they quote prompts)."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    for name in ("uvicorn", "rldecoder.serve"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    return logging.WARNING
