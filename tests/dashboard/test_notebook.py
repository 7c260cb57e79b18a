"""What a notebook shows: the report's styles inside our own element, every text escaped."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rldecoder import open_run
from rldecoder.artifacts.catalogue import SaeGate, TrainedSae
from rldecoder.artifacts.manifests import MANIFEST
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import load_run_config
from rldecoder.dashboard.notebook import ShownReading
from rldecoder.explain.inputs import LabelText
from rldecoder.run import Run
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT

CONFIG = ROOT / "configs" / "debug.yaml"
HOSTILE = "</style></script><img src=x onerror=alert(1)>\u202e\u200b\x1b[2J{{7*7}}<!--"
ALLOWED = {
    "div", "style", "table", "thead", "tbody", "tr", "th", "td", "span", "p", "article", "ul",
    "li", "br",
}  # fmt: skip


class Tags(HTMLParser):
    """Names of tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_hostile_tokens_and_labels_are_inert(run: Run) -> None:
    texts = {
        latent: LabelText(HOSTILE, 0.5, latent % 2 == 0) for latent in range(run.sae().num_latents)
    }
    reader = replace(run.reader(), labels=texts)
    ids = reader.lm.encode_prompt(HOSTILE)
    reading = ShownReading(reader, ids, HOSTILE)
    for html in (
        reading._repr_html_(), reading.features(-1)._repr_html_(), reading.explain()._repr_html_(),
    ):  # fmt: skip
        found = Tags()
        found.feed(html)
        assert found.tags <= ALLOWED
        assert found.attributes <= {"class", "scope"}
        for char in "\u202e\u200b\x1b":
            assert char not in html
        assert html.count("</style>") == 1


def test_a_notebook_keeps_its_own_looks(run: Run) -> None:
    html = run.read("One and two")._repr_html_()
    css = html.partition("<style>")[2].partition("</style>")[0]
    assert css.startswith("@scope (.rldecoder) {")
    assert ":root" not in css  # variables belong to our element
    assert not [line for line in css.splitlines() if line.strip().startswith("body ")]


def test_a_reading_shows_predictions_of_both_models(run: Run) -> None:
    reading = run.read("One and two")
    html = reading._repr_html_()
    assert html.count("<tr>") == len(reading.tokens) + 1
    assert f"{reading.predictions[-1].frozen[0].probability:.2f}" in html
    table = reading.features(-1)
    shown = table._repr_html_()
    assert shown.count("<tr>") == len(table) + 1
    assert f"{table[0].effect:+.3f}" in shown
    assert "frozen model predicts" in reading.explain()._repr_html_()


def test_no_feature_of_a_reading_is_a_bare_number(run: Run) -> None:
    reader = run.reader()
    ids = reader.lm.encode_prompt("One and two")
    texts = {latent: LabelText("a guess", 0.2) for latent in range(0, run.sae().num_latents, 2)}
    html = ShownReading(replace(reader, labels=texts), ids, "One and two")._repr_html_()
    said = re.findall(r"#(\d+)</span> (unsure: a guess|not labelled; )", html)
    assert len(said) == len(re.findall(r"#\d+</span>", html)) > 6
    assert {int(latent) % 2 == 0 for latent, _ in said} == {True, False}
    assert all((int(latent) % 2 == 0) == (words == "unsure: a guess") for latent, words in said)


def test_a_long_reading_is_cut(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rldecoder.dashboard.notebook.SHOWN_TOKENS", 3)
    reading = run.read("One and two and three")
    html = reading._repr_html_()
    assert html.count("<tr>") == 4
    assert f"The first {len(reading.tokens) - 3} tokens are not shown." in html


def test_a_run_shows_what_is_built_with_verdicts_and_numbers(run: Run) -> None:
    html = run._repr_html_()
    assert html.count("<tr>") == len(STAGES) + 1
    assert f"{len(STAGES)} of {len(STAGES)} stages are built" in html
    gate = run.artifact(SaeGate)
    assert f'<span class="chip {gate.verdict}">{gate.verdict}</span>' in html
    assert f"validation_fvu {run.artifact(TrainedSae).metrics['validation_fvu']:.3g}" in html
    assert gate.caveats
    assert "not built yet" not in html


def test_a_run_without_artifacts_is_shown_too(tmp_path: Path) -> None:
    html = open_run(CONFIG, tmp_path)._repr_html_()
    assert f"0 of {len(STAGES)} stages are built" in html
    assert html.count("not built yet") == len(STAGES)


def test_a_hostile_run_is_inert_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    config = load_run_config(CONFIG)
    run = Run(config.model_copy(update={"name": HOSTILE}), ArtifactStore(tmp_path / "<b>store"))
    ref = run.refs[TrainedSae.stage]
    folder = run.store.path(ref)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{")
    found = Tags()
    found.feed(html := run._repr_html_())
    assert found.tags <= ALLOWED | {"strong"}
    assert found.attributes <= {"class", "scope"}
    assert html.count("</style>") == 1
    assert html.count("damaged, will be built again") == 1
    assert repr(run).endswith("damaged: train_sae>")
