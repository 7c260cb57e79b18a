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
    **{
        name: ("rldecoder.serve", f"static/{name}")
        for name in (
            "common.js", "state.js", "parts.js", "sheet.js", "changes.js", "trace.js",
            "intervene.js", "explain.js", "steer.js", "compare.js", "feature.js", "features.js",
            "review.js", "start.js", "icon.svg",
        )
    },
}  # fmt: skip
"""Everything that is served as a file, by its name; nothing else can be asked for. Scripts run in
this order."""
TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
MAX_EXAMPLE = 120
"""Characters of a prompt to click: longer ones are left out."""
SCRIPTS = tuple(name for name in ASSETS if name.endswith(".js"))


class PageFacts(NamedTuple):
    """What stands on the page before any question was asked. Texts in it are raw."""

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
    about: tuple[str, str]
    """What this run is of, and how far to trust it (`serve.about`)."""
    examples: tuple[str, ...]
    """Prompts to click."""


def main_page(facts: PageFacts, token: str) -> str:
    """The page. Autoescaped; the token stands in a `meta` element, which other origins cannot
    read."""
    shown = facts._replace(
        run_name=visible_text(facts.run_name, 80),
        model_name=visible_text(facts.model_name, 80),
        caveats=[visible_text(caveat, 600) for caveat in facts.caveats],
        reviews_file=visible_text(facts.reviews_file, 300),
        about=(visible_text(facts.about[0], 600), visible_text(facts.about[1], 600)),
        examples=tuple(visible_text(prompt, MAX_EXAMPLE) for prompt in facts.examples),
    )
    return _template("page.html.j2", {**shown._asdict(), "token": token, "scripts": SCRIPTS})


def error_response(path: str, status: int, what: str, why: str, mend: str) -> Response:
    """What happened, why, and how to mend it: JSON below /api/, a page elsewhere."""
    parts = error_parts(what, why, mend)
    headers = {"retry-after": "1"} if status == 503 else None
    if path.startswith("/api/"):
        return JSONResponse({"error": parts}, status_code=status, headers=headers)
    html = _template("error.html.j2", {**parts, "status": status})
    return HTMLResponse(html, status_code=status, headers=headers)


def error_parts(what: str, why: str, mend: str) -> dict[str, str]:
    """The three parts of an error, made visible."""
    parts = {"what": what, "why": why, "mend": mend}
    return {name: visible_text(text, 600) for name, text in parts.items()}


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
