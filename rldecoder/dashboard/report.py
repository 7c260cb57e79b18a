"""The run's report: one HTML page that loads nothing, and the same facts as Markdown."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rldecoder.dashboard.cards import FeatureCard
from rldecoder.dashboard.collect import ConfigShown, PhaseShown, format_seconds
from rldecoder.dashboard.figures import Drawing
from rldecoder.dashboard.opening import Sentence
from rldecoder.dashboard.shown import ExampleShown
from rldecoder.decoder.faithfulness import Faithfulness
from rldecoder.evals.comparison import TaskScore
from rldecoder.evals.targets import TargetRow
from rldecoder.visible_text import visible_text

SECTIONS = (
    ("targets", "Targets"),
    ("pipeline", "Pipeline"),
    ("faithfulness", "Faithfulness"),
    ("rl", "Reinforcement learning"),
    ("features", "Features"),
    ("explanations", "Explanations"),
    ("reproduce", "Reproduce"),
)
SCRIPTS = ("cards.js", "report.js")
FIGURE_NAMES = (
    "architecture", "lens", "sweep", "frontier", "sae", "decoder", "density", "ppo", "ppo_task",
    "tasks", "mass", "top10_mass", "calibration", "deletion", "precision",
)  # fmt: skip


class Fact(NamedTuple):
    """A headline number."""

    name: str
    value: str
    more: str = ""
    """What it is of, or its unit; shown small."""


class FaithfulnessRow(Faithfulness):
    """A decoder on a split."""

    model: str
    """Named for people."""
    split: str
    """`test` or `ood`."""


class ControlsShown(NamedTuple):
    """The table of PPO's controls, and the verdict."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    verdict: str
    reasons: str
    measured_on: str = ""
    """How these numbers differ from others of the same name on the page."""


class HarnessShown(NamedTuple):
    """The table of lm-evaluation-harness."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    version: str


class FigureEntry(NamedTuple):
    """One figure with its words."""

    drawing: Drawing
    title: str
    caption: str


@dataclass(frozen=True)
class ReportData:
    """Everything on the page. All texts have passed `visible_text`."""

    title: str
    subtitle: str
    opening: Sequence[Sentence]
    """The five sentences that the page begins with."""
    facts: Sequence[Fact]
    caveats: Sequence[str]
    targets: Sequence[TargetRow]
    pipeline: Sequence[PhaseShown]
    faithfulness: Sequence[FaithfulnessRow]
    tasks: Sequence[TaskScore]
    """Models named for people."""
    freeze_note: str
    controls: ControlsShown | None
    harness: HarnessShown | None
    label_columns: Sequence[str]
    label_methods: Sequence[Sequence[str]]
    claim_columns: Sequence[str]
    claim_methods: Sequence[Sequence[str]]
    claim_note: str
    simulation_columns: Sequence[str]
    simulation_rows: Sequence[Sequence[str]]
    simulation_note: str
    examples: Sequence[ExampleShown]
    features: Sequence[FeatureCard]
    configs: Sequence[ConfigShown]
    figures: Mapping[str, FigureEntry] = field(default_factory=dict)


def render_html(data: ReportData) -> str:
    """The self-contained page.

    A content security policy allows one script, named by its hash, and no request to anywhere.
    Text is escaped by Jinja's autoescape; the feature data lies in a JSON block in which `<`, `>`
    and `&` are escaped, and the script puts it on the page as `textContent` only.
    """
    css = (_templates() / "report.css").read_text(encoding="utf-8")
    cards = [card.model_dump(mode="json") for card in data.features]
    values = vars(data) | {
        "figures": dict.fromkeys(FIGURE_NAMES) | dict(data.figures),
        "sections": SECTIONS,
        "css": Markup(css),
        "script": Markup(_script()),
        "script_sha256": script_sha256(),
        "feature_json": Markup(script_json(cards)),
    }
    return environment(autoescape=True).get_template("report.html.j2").render(values)


def script_sha256() -> str:
    """SHA-256 of the page's script in base64, as content security policies name it."""
    return base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()


def _script() -> str:
    return "".join((_templates() / name).read_text(encoding="utf-8") for name in SCRIPTS)


def _templates() -> Traversable:
    return files("rldecoder.dashboard") / "templates"


def render_markdown(data: ReportData) -> str:
    """The run's page for docs/experiments/: tables only, no times, no pictures."""
    text = environment(autoescape=False).get_template("experiment.md.j2").render(vars(data))
    return text.rstrip() + "\n"


def script_json(value: Any) -> str:
    """JSON that cannot end the `<script>` element it is put in, whatever strings it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: nothing in it becomes a table cell, a link or HTML."""
    shown = visible_text(text, 600)
    for char in "\\`*_[]<>|#&":
        shown = shown.replace(char, f"\\{char}" if char != "&" else "&amp;")
    return shown


@lru_cache(maxsize=2)
def environment(*, autoescape: bool) -> Environment:
    """The page templates; `md` escapes for Markdown, `duration` writes seconds."""
    environment = Environment(
        loader=PackageLoader("rldecoder.dashboard", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    environment.filters |= {"md": markdown_text, "duration": format_seconds}
    return environment
