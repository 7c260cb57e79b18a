"""The report in Chromium, from the file system: quiet, alone, by keyboard, accessible, inert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import load_run_config
from rldecoder.dashboard.build import harness_table
from rldecoder.dashboard.cards import Context, feature_cards
from rldecoder.dashboard.claims import precision_columns, simulation_columns
from rldecoder.dashboard.label_table import label_columns
from rldecoder.dashboard.report import ReportData, render_html
from rldecoder.dashboard.shown import ExampleShown
from rldecoder.evals.harness_scores import HarnessScores, Score
from rldecoder.explain.claims import CheckedClaim, Claim
from rldecoder.explain.explanation import Explanation, Prediction
from rldecoder.interp.records import Example
from rldecoder.runner import plan
from tests.browser import open_browser
from tests.conftest import ROOT
from tests.dashboard.conftest import HOSTILE
from tests.dashboard.test_collect import label, saved

HIDDEN = "a\u202eb\u200b\x1b[2J\u2066c\ufeff</script><img src=x onerror=alert(1)>"
pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def page_file(data: ReportData, tmp_path: Path) -> Path:
    """The page with hostile text everywhere, ten thousand characters in some of it."""
    long = Context.model_construct(
        kind="top", tokens=("a", "W" * 10_000), heat=(0.0, 1.0), act=1.0, focus=1
    )
    features = [*data.features[:2], data.features[2].model_copy(update={"examples": (long,)})]
    path = tmp_path / "report.html"
    path.write_text(render_html(replace(data, features=features)), encoding="utf-8")
    return path


def test_the_page_runs_alone_and_by_keyboard(page_file: Path, data: ReportData) -> None:
    with open_browser() as browser:
        page = browser.page
        page.goto(page_file.as_uri())
        assert page.locator("article.card").count() == 3
        assert page.locator("img").count() == 0
        guesses = page.locator("article.card h4", has_text="unsure: ")
        named = [feature for feature in data.features if feature.label is not None]
        assert guesses.count() == sum(not feature.high for feature in named)
        assert 0 < guesses.count() < len(named)
        described = page.locator("article.card h4", has_text="not labelled; ")
        assert described.count() == sum(not feature.is_label for feature in data.features) > 0
        card = page.locator("article.card").first
        scores = card.locator(".meta.scores span").all_text_contents()
        names = ("detection 0.11", "detection on near misses 0.17", "fuzzing –", "F1 0.15",
                 "fuzzing on near misses 0.18", "intruder 0.19", "simulation r 0.20",
                 "precision 0.13", "recall 0.14", "AUPRC 0.16")  # fmt: skip
        assert sorted(scores) == sorted(names)
        other = card.locator(".other")
        assert other.count() == 2
        assert HOSTILE in str(other.first.text_content())
        assert "failed: " + HOSTILE in str(other.last.text_content())
        assert "no confidence: " + HOSTILE in str(other.last.text_content())
        for shown in (
            "confidence 0.25 [0.13, 0.50]",
            "detection 0.63",
            "precision over windows 0.25",
            "1 of 2 answers missing",
        ):
            assert shown in str(other.first.text_content())
        assert "do not believe" in str(other.first.text_content())
        assert page.text_content("#count") == "3 of 3 features"
        page.keyboard.press("/")
        page.keyboard.type("months")
        assert page.text_content("#count") == "1 of 3 features"
        page.keyboard.press("Control+A")
        page.keyboard.press("Delete")
        browser.tab_to("#sort")
        page.keyboard.press("End")  # the last way of sorting: by place in the review queue
        assert (page.locator("article.card h4").first.text_content() or "").startswith("#2 ")
        browser.tab_to("#only")
        page.keyboard.press("End")  # those without a label
        assert page.text_content("#count") == "1 of 3 features"
        browser.tab_to("details.stage summary", back=True, limit=200)
        page.keyboard.press("Enter")
        assert page.locator("details.stage[open]").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
        assert browser.trouble == []
        assert browser.requests == [page_file.as_uri()]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 420)])
def test_axe_finds_nothing_serious(page_file: Path, scheme: str, width: int) -> None:
    with open_browser(scheme=scheme, width=width) as browser:
        browser.page.goto(page_file.as_uri())
        browser.page.locator("details.stage summary").first.click()
        assert browser.serious() == []


@pytest.mark.parametrize("width", [1280, 390])
def test_tables_and_legends_are_whole(data: ReportData, tmp_path: Path, width: int) -> None:
    """Nothing is cut off or has to be scrolled for; on a telephone rows are cards."""

    def rows(columns: Sequence[str]) -> list[list[str]]:
        return [["random features", *["0.623 [0.581, 0.667]"] * (len(columns) - 1)]] * 2

    labels, claims, simulated = label_columns(), precision_columns(), simulation_columns()
    asked = Score(
        task="documentation_choices", system="spliced", metric="exact_match", filter="answer",
        n=500, value=0.612, stderr=0.022, delta=-0.031, delta_stderr=0.012, ours=0.612,
    )  # fmt: skip
    path = tmp_path / "report.html"
    usual = replace(
        data, caveats=[], harness=harness_table(HarnessScores(harness="0.4.13", scores=(asked,))),
        label_columns=labels, label_methods=rows(labels), claim_columns=claims,
        claim_methods=rows(claims), simulation_columns=simulated, simulation_rows=rows(simulated),
    )  # fmt: skip
    path.write_text(render_html(usual), encoding="utf-8")
    with open_browser(width=width) as browser:
        page = browser.page
        page.goto(path.as_uri())
        assert (page.locator(".opening li").first.text_content() or "").startswith("Decoded:")
        places = page.evaluate(
            """() => [...document.querySelectorAll(".opening li, .scroll td, figure svg text")]
                .map(e => [e.getBoundingClientRect(), e.tagName])
                .filter(([r]) => r.width > 0 && (r.right > innerWidth + 1 || r.left < -1))
                .map(([r, name]) => [name, r.left, r.right])"""
        )
        assert places == []
        wide = page.evaluate(
            """() => [...document.querySelectorAll(".scroll")]
                .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.ariaLabel)"""
        )
        assert wide == []
        if width == 390:
            label = page.evaluate(
                "getComputedStyle(document.querySelector('.scroll td.num'), '::before').content"
            )
            assert "goal" in label


def test_printing_shows_what_was_folded(page_file: Path) -> None:
    with open_browser() as browser:
        page = browser.page
        page.goto(page_file.as_uri())
        pdf = page.pdf(format="A4")
        assert pdf.startswith(b"%PDF")
        page.emulate_media(media="print")
        assert page.locator("nav").is_hidden()
        assert page.locator(".tools").is_hidden()
        assert page.locator("details.stage:not([open])").count() == 0


def test_hostile_text_of_artifacts_is_gone_or_visible(data: ReportData, tmp_path: Path) -> None:
    """Through the functions that read artifacts: what a browser shows has no such character."""
    window = Example(seq_id=4, pos=1, act=2.0, tokens=["x", HIDDEN, "W" * 10_000], focus=1)
    artifacts = saved(tmp_path, label(3, 1, HIDDEN, [window]), label(7, 2, None, []))
    features = feature_cards(*artifacts, max_features=9, contexts=9)
    prediction = Prediction(HIDDEN, 1, 0.5, ((HIDDEN, 0.5),) * 3)
    claim = Claim(3, HIDDEN, 1, HIDDEN, "supports", 0.4, 0.1, HIDDEN, 0.5, 0.9)
    explanation = Explanation(
        prompt=HIDDEN, tokens=(HIDDEN,), frozen=prediction, decoder=prediction, kl=0.1,
        method_a=HIDDEN, ranked=(), method_b=HIDDEN, sanity=None,
        claims=(CheckedClaim(claim, 0.5, "supported", -0.1),),
    )  # fmt: skip
    example = ExampleShown.of(explanation)
    path = tmp_path / "report.html"
    shown = replace(data, features=features, examples=[example])
    path.write_text(render_html(shown), encoding="utf-8")
    with open_browser() as browser:
        page = browser.page
        page.goto(path.as_uri())
        assert page.locator("article.card").count() == 2
        text = str(page.evaluate("document.body.textContent"))
        assert not set(text) & set("\u202e\u2066\u200b\ufeff\x1b")
        cards = str(page.text_content("#cards"))
        examples = str(page.text_content("#explanations"))
        for part in (cards, examples):
            assert "a⟨U+202E⟩b⟨U+200B⟩␛[2J" in part
            assert "</script><img src=x onerror=alert(1)>" in part
        assert page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
        assert browser.trouble == []


@pytest.fixture
def real_report(debug_store: Path) -> Path:
    """The report of the debug run, as the stage published it."""
    run = load_run_config(ROOT / "configs" / "debug.yaml")
    return ArtifactStore(debug_store).path(plan(run)["report"]) / "report.html"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 420)])
def test_the_report_of_a_real_run(real_report: Path, scheme: str, width: int) -> None:
    with open_browser(scheme=scheme, width=width) as browser:
        page = browser.page
        page.goto(real_report.as_uri())
        assert page.locator("figure svg").count() >= 15
        assert page.locator("article.card").count() == 12
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
        assert browser.serious() == []
        assert browser.trouble == []
        assert browser.requests == [real_report.as_uri()]


def test_no_table_is_cut_off_on_paper(real_report: Path) -> None:
    """A4 between the usual margins is 718 CSS pixels wide, and nobody scrolls it sideways."""
    with open_browser(width=718) as browser:
        page = browser.page
        page.goto(real_report.as_uri())
        widest = "[...document.querySelectorAll('thead tr')].map(row => row.children.length)"
        assert max(page.evaluate(widest)) == 12  # labels and their controls; simulatability has 11
        page.emulate_media(media="print")
        cut = page.evaluate(
            "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth >"
            " box.clientWidth).map(box => box.getAttribute('aria-label'))"
        )
        assert cut == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
