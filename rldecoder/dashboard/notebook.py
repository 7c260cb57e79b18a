"""Runs, readings and explanations as notebooks show them: the report's styles, escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files

from markupsafe import Markup

from rldecoder.artifacts.base import Artifact
from rldecoder.dashboard.collect import caveats, pipeline
from rldecoder.dashboard.report import environment
from rldecoder.dashboard.shown import ExampleShown, MeasuredShown, TokenShown
from rldecoder.explain.explanation import Explanation
from rldecoder.explain.read_records import FeatureTable
from rldecoder.explain.reading import Reading
from rldecoder.explain.target import Target
from rldecoder.visible_text import visible_text, visible_token

SHOWN_TOKENS = 200
"""Rows of a reading's table; a notebook is no place for thousands."""


class ShownExplanation(Explanation):
    """An explanation that a notebook shows."""

    def _repr_html_(self) -> str:
        return _html("notebook_explanation.html.j2", example=ExampleShown.of(self))


class ShownFeatures(FeatureTable):
    """A feature table that a notebook shows."""

    def _repr_html_(self) -> str:
        rows = [MeasuredShown.model_validate(row) for row in self]
        token = visible_token(self.token.token)
        minus = None if self.minus is None else visible_token(self.minus.token)
        return _html("notebook_features.html.j2", rows=rows, token=token, minus=minus, at=self.at)


class ShownReading(Reading):
    """A reading that a notebook shows, with what is asked of it."""

    def features(self, at: int = -1, target: Target | None = None) -> ShownFeatures:
        """See `Reading.features`."""
        table = super().features(at, target)
        return ShownFeatures(list(table), table.token, table.at, table.minus)

    def explain(self, at: int = -1) -> ShownExplanation:
        """See `Reading.explain`."""
        return ShownExplanation(**vars(super().explain(at)))

    def _repr_html_(self) -> str:
        shown = self.predictions[-SHOWN_TOKENS:]
        first = len(self.predictions) - len(shown)
        tokens = [TokenShown.model_validate(trace) for trace in shown]
        return _html("notebook_reading.html.j2", tokens=tokens, left_out=first)


def run_html(name: str, place: str, published: Sequence[Artifact], damaged: Sequence[str]) -> str:
    """A run: which stages are built, their verdicts and headline numbers.

    Args:
        published: in the order of the pipeline.
        damaged: stages whose manifest cannot be read.
    """
    phases = pipeline(published)
    return _html(
        "notebook_run.html.j2",
        name=visible_text(name, 80),
        place=visible_text(place, 200),
        phases=phases,
        built=len(published),
        number=sum(len(phase.stages) for phase in phases),
        damaged=damaged,
        caveats=caveats(published),
    )


def release_html(name: str, place: str, released: Sequence[Artifact]) -> str:
    """A release: which stages' results it holds, their verdicts and headline numbers.

    Args:
        name: of the run that it was made from.
        released: in the order of the pipeline.
    """
    return _html(
        "notebook_release.html.j2",
        name=visible_text(name, 80),
        place=visible_text(place, 200),
        stages=[stage for phase in pipeline(released) for stage in phase.stages if stage.digest],
        caveats=caveats(released),
    )


def _html(template: str, **values: object) -> str:
    page = environment(autoescape=True).get_template(template)
    return page.render(css=Markup(_scoped_css()), **values)


@lru_cache(maxsize=1)
def _scoped_css() -> str:
    """The report's styles for what is inside our own element: a notebook keeps its looks."""
    file = files("rldecoder.dashboard") / "templates" / "report.css"
    css = file.read_text(encoding="utf-8").replace(":root", ":scope")
    css = re.sub(r"^( *)body \{", r"\1:scope {", css, flags=re.MULTILINE)
    return f"@scope (.rldecoder) {{\n{css}\n}}"
