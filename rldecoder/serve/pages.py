"""The HTML of the server: one page, and pages that say what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, JSONResponse, Response

from rldecoder.visible_text import visible_text

ASSETS = {
    "base.css": ("rldecoder.dashboard", "templates/report.css"),
    "serve.css": ("rldecoder.serve", "static/serve.css"),
    "cards.js": ("rldecoder.dashboard", "templates/cards.js"),
    "common.js": ("rldecoder.serve", "static/common.js"),
    "trace.js": ("rldecoder.serve", "static/trace.js"),
    "intervene.js": ("rldecoder.serve", "static/intervene.js"),
    "features.js": ("rldecoder.serve", "static/features.js"),
    "review.js": ("rldecoder.serve", "static/review.js"),
    "icon.svg": ("rldecoder.serve", "static/icon.svg"),
}
"""Everything that is served as a file, by its name; nothing else can be asked for."""
TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SCRIPTS = tuple(name for name in ASSETS if name.endswith(".js"))


class PageFacts(NamedTuple):
    """What stands on the page before any question was asked."""

    run_name: str
    model_name: str
    dtype: str
    """Of the frozen model's weights as they are loaded."""
    hook_layer: int
    num_latents: int
    num_labelled: int
    max_tokens: int
    caveats: Sequence[str]
    reviews_file: str
    has_report: bool


def main_page(facts: PageFacts, token: str) -> str:
    """The page. Autoescaped; the token stands in a `meta` element, which other origins cannot
    read."""
    shown = facts._replace(
        run_name=visible_text(facts.run_name, 80),
        model_name=visible_text(facts.model_name, 80),
        caveats=[visible_text(caveat, 600) for caveat in facts.caveats],
        reviews_file=visible_text(facts.reviews_file, 300),
    )
    return _template("page.html.j2", {**shown._asdict(), "token": token, "scripts": SCRIPTS})


def error_response(path: str, status: int, what: str, why: str, mend: str) -> Response:
    """What happened, why, and how to mend it: JSON below /api/, a page elsewhere."""
    parts = {
        "what": visible_text(what, 600),
        "why": visible_text(why, 600),
        "mend": visible_text(mend, 600),
    }
    headers = {"retry-after": "1"} if status == 503 else None
    if path.startswith("/api/"):
        return JSONResponse({"error": parts}, status_code=status, headers=headers)
    html = _template("error.html.j2", {**parts, "status": status})
    return HTMLResponse(html, status_code=status, headers=headers)


@lru_cache(maxsize=len(ASSETS))
def asset(name: str) -> tuple[bytes, str]:
    """Content and media type of one asset.

    Raises:
        KeyError: there is no asset of this name.
    """
    package, place = ASSETS[name]
    content = files(package).joinpath(place).read_bytes()
    return content, TYPES[name.rpartition(".")[2]]


def _template(name: str, values: Mapping[str, object]) -> str:
    return _environment().get_template(name).render(**values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("rldecoder.serve", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
