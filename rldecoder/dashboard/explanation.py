"""One explanation as a self-contained page (`rldecoder explain --html`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from markupsafe import Markup

from rldecoder.dashboard.report import environment
from rldecoder.dashboard.shown import ExampleShown, FeatureShown
from rldecoder.explain.explanation import Explanation
from rldecoder.visible_text import visible_text


def explanation_page(explanation: Explanation, run_name: str, caveats: Sequence[str]) -> str:
    """The page; it holds no script, and its policy allows none and no request.

    Args:
        run_name: of the run whose decoder was asked.
        caveats: what readers must be told about that run.
    """
    css = (files("rldecoder.dashboard") / "templates" / "report.css").read_text(encoding="utf-8")
    return (
        environment(autoescape=True)
        .get_template("explanation.html.j2")
        .render(
            css=Markup(css),
            run_name=visible_text(run_name, 80),
            caveats=[visible_text(caveat, 600) for caveat in caveats],
            example=ExampleShown.of(explanation),
            ranked=[FeatureShown.model_validate(feature) for feature in explanation.ranked],
        )
    )
