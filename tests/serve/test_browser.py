"""The page in Chromium: by keyboard alone, without a word on the console, inert, accessible."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from rldecoder.explain.reading import Reading
from rldecoder.serve.served import Served
from tests.browser import Watched, open_browser
from tests.serve.conftest import HOSTILE, PROMPT, Running

HOSTILE_MARKUP = "</script><img src=x onerror=alert(1)>{{7*7}}<!--" + "W" * 10_000

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def assert_quiet(browser: Watched, url: str) -> None:
    """Nothing on the console, nothing asked of anybody else."""
    assert browser.trouble == []
    assert browser.requests
    assert [request for request in browser.requests if not request.startswith(url)] == []


def ask(page: Page, server: Running) -> None:
    """Open the page and send the prompt."""
    page.goto(server.url)
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Control+Enter")


def test_everything_works_by_keyboard(running: Running, own_reviews: Served) -> None:
    with open_browser() as browser:
        page, keys = browser.page, browser.page.keyboard
        page.goto(running.url)
        browser.tab_to("#prompt")
        keys.type(PROMPT)
        keys.press("Control+Enter")
        page.wait_for_selector("#active-rows tr")
        tokens = page.locator("#tokens [role=option]")
        last = tokens.count() - 1
        assert tokens.nth(last).get_attribute("aria-selected") == "true"

        # Arrow keys walk over the tokens.
        browser.tab_to("#tokens [role=option]")
        keys.press("ArrowLeft")
        keys.press("ArrowLeft")
        expect(page.locator("#where")).to_contain_text(f"after token {last - 2} of {last}")
        keys.press("Home")
        expect(page.locator("#effect-meaning")).to_contain_text("attention sink")
        assert page.locator("#explain").is_disabled()
        keys.press("End")
        page.wait_for_selector("#active-rows tr")

        # Take the first feature out, with Enter.
        browser.tab_to("#active-rows button[aria-label^='take out']")
        keys.press("Enter")
        page.wait_for_selector(".change-table")
        row = page.locator("#active-rows tr").first
        latent = int(str(row.locator(".feature-name").text_content()).removeprefix("#"))
        exact = own_reviews.workbench.read(PROMPT).ablate(latent, last)
        assert shown_after(page, 1) == percent(exact.decoder.shifts[0].after)

        # A feature's page opens, and Back leads to the prompt as it was.
        browser.tab_to("#active-rows .feature-name", back=True)
        keys.press("Enter")
        expect(page.locator("#feature-title")).to_contain_text(f"#{latent}")
        page.wait_for_selector("#unseen .context")
        page.go_back()
        page.wait_for_selector(".change-table")
        browser.tab_to("#explain")
        keys.press("Enter")
        page.wait_for_selector("#explanation .tag")

        # Tabs by arrow, search by slash.
        browser.tab_to("#tab-trace", back=True, limit=200)
        for _ in range(3):
            keys.press("ArrowRight")
        page.wait_for_selector("#cards article")
        keys.press("/")
        keys.type("zzqq")
        expect(page.locator("#count")).to_contain_text("0 of")
        browser.tab_to("#tab-features", back=True)
        keys.press("ArrowRight")
        page.wait_for_selector("#review-card article")

        # A verdict without a name is not taken; with one it is, and the next label comes.
        def heading() -> str:
            return str(page.locator("#review-card h4").text_content())

        first = heading()
        keys.press("a")
        page.wait_for_selector("#problem:not([hidden])")
        assert not running.reviews.exists()
        assert page.evaluate("document.activeElement.id") == "reviewer"
        keys.type("ann a.")  # letters in a field are text
        keys.press("Escape")
        keys.press("a")
        expect(page.locator("#review-card h4")).not_to_have_text(first)
        second = heading()
        keys.press("l")
        keys.type("a better one")
        keys.press("Enter")
        expect(page.locator("#review-card h4")).not_to_have_text(second)
        third = heading()
        keys.press("s")
        expect(page.locator("#review-card h4")).not_to_have_text(third)
        keys.press("b")
        expect(page.locator("#review-card h4")).to_have_text(third)
        keys.press("r")
        expect(page.locator("#given li")).to_have_count(3)
        assert_quiet(browser, running.url)
    lines = [json.loads(line) for line in running.reviews.read_text().splitlines()]
    assert [(line["accept"], line["label"]) for line in lines] == [
        (True, None), (None, "a better one"), (False, None),
    ]  # fmt: skip
    assert {line["reviewer"] for line in lines} == {"ann a."}
    latents = [int(text.removeprefix("#").split()[0]) for text in (first, second, third)]
    assert [line["latent"] for line in lines] == latents


def shown_after(page: Page, model: int) -> str:
    """The first choice's probability after an intervention; model 0 is the frozen one."""
    row = page.locator(".change-table").nth(model).locator("tbody tr").first
    return str(row.locator("td").nth(2).text_content())


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if 100 * share >= 9.95 else f"{100 * share:.1f} %"


def test_a_clicked_token_and_an_amplified_feature_by_mouse(
    running: Running, own_reviews: Served
) -> None:
    reading = own_reviews.workbench.read(PROMPT)
    with open_browser() as browser:
        page = browser.page
        ask(page, running)
        page.wait_for_selector("#active-rows tr")
        tokens = page.locator("#tokens [role=option]")
        place = tokens.count() - 2
        tokens.nth(place).click()
        expect(page.locator("#where")).to_contain_text(f"after token {place} of {place + 1}")
        page.wait_for_selector("#active-rows tr")
        page.fill("#factor", "3")
        page.locator("#active-rows button[aria-label^='amplify']").first.click()
        page.wait_for_selector(".change-table")
        name = page.locator("#active-rows tr").first.locator(".feature-name").text_content()
        exact = reading.amplify(int(str(name).removeprefix("#")), 3.0, place)
        assert shown_after(page, 0) == percent(exact.frozen.shifts[0].after)
        assert shown_after(page, 1) == percent(exact.decoder.shifts[0].after)
        assert_quiet(browser, running.url)


def test_a_late_answer_about_another_token_is_dropped(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go, answer = threading.Event(), threading.Event(), Reading.features
    with open_browser() as browser:
        page, keys = browser.page, browser.page.keyboard
        page.goto(running.url)
        browser.tab_to("#prompt")
        keys.type(PROMPT)
        keys.press("Control+Enter")
        page.wait_for_selector("#active-rows tr")

        def late(*arguments: Any) -> Any:
            asked.set()
            assert go.wait(500)
            return answer(*arguments)

        monkeypatch.setattr(Reading, "features", late)
        browser.tab_to("#tokens [role=option]")
        keys.press("ArrowLeft")
        assert asked.wait(60)
        keys.press("Home")
        expect(page.locator("#effect-meaning")).to_contain_text("attention sink")
        go.set()
        page.wait_for_timeout(1000)
        expect(page.locator("#effect-meaning")).to_contain_text("attention sink")
        assert page.locator("#active-rows tr").count() == 0


@pytest.mark.parametrize(
    ("moved", "words"),
    [
        ([0.3], ". The linear decoder reads one token, so that its later ones stay."),
        ([0.3, 0.0625, 0.125], ", the decoder’s by up to 0.125 nats."),
    ],
)
def test_later_moves_are_those_of_the_decoder_at_hand(
    running: Running, moved: list[float], words: str
) -> None:
    def change(moved: list[float]) -> dict[str, Any]:
        return {
            "shifts": [{"token": "x", "token_id": 1, "before": 0.5, "after": 0.25}],
            "effect": 0.7,
            "moved": moved,
            "target": [-0.7, -1.4],
        }

    answer = {
        "at": 15, "first": 15, "act": 1.0, "new_act": 0.0, "about": "log p", "code": "",
        "frozen": change([0.3, 0.5, 0.25]), "decoder": change(moved),
    }  # fmt: skip
    with open_browser() as browser:
        page = browser.page
        page.route("**/api/intervene", lambda route: route.fulfill(json=answer))
        ask(page, running)
        page.locator("#active-rows button[aria-label^='take out']").first.click()
        page.wait_for_selector(".change-table")
        said = page.locator("#change-body > .note").all_text_contents()
        start = "The frozen model’s later predictions move by up to 0.500 nats (coloured above)"
        assert said == [start + words]
        assert browser.trouble == []


def test_a_hostile_claim_does_nothing(running: Running) -> None:
    """The page's own defence: what a claim says is text, whatever the server let through."""
    prediction = {"token": HOSTILE_MARKUP, "p": 0.5, "then": []}
    claim = {
        "sentence": HOSTILE_MARKUP, "verdict": "<img src=x>", "css": "supported",
        "change": 0.25, "decoder_change": -0.5, "noise": 0.125, "measured": HOSTILE_MARKUP,
    }  # fmt: skip
    answer = {
        "prompt": HOSTILE_MARKUP, "cut": False, "kl": 0.1, "frozen": prediction,
        "decoder": prediction, "agree": True, "active": [["#7", "0.75", HOSTILE_MARKUP]],
        "says": HOSTILE_MARKUP, "claims": [claim], "more_claims": [claim],
        "tested": HOSTILE_MARKUP,
    }  # fmt: skip
    with open_browser() as browser:
        page = browser.page
        page.route("**/api/explain", lambda route: route.fulfill(json=answer))
        ask(page, running)
        page.wait_for_selector("#active-rows tr")
        page.click("#explain")
        page.wait_for_selector("#explanation .claims li")
        shown = str(page.text_content("#explanation"))
        # Both methods, two claims with what was measured, what was tested.
        assert shown.count(HOSTILE_MARKUP) == 7
        assert page.locator("#explanation .chip").all_text_contents() == ["<img src=x>"] * 2
        assert "frozen model: " + HOSTILE_MARKUP in shown  # the badge judges that one
        assert page.locator("#explanation details").get_attribute("open") is None
        assert page.locator("#explanation img, #explanation script").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
        assert_quiet(browser, running.url)


def test_the_report_is_quiet_here_too(running: Running) -> None:
    with open_browser() as browser:
        page = browser.page
        page.goto(running.url)
        page.click("header a[href='/report']")
        page.wait_for_selector("article.card")
        assert page.url == running.url + "report"
        assert browser.serious() == []
        assert_quiet(browser, running.url)


def test_shortcuts_can_be_turned_off(running: Running) -> None:
    with open_browser() as browser:
        page = browser.page
        page.goto(running.url)
        page.locator("#tab-review").focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#review-card article")
        page.locator("#shortcuts").focus()
        page.keyboard.press("Space")
        page.keyboard.press("a")
        page.keyboard.press("s")
        assert page.locator("#problem").is_hidden()
        assert page.locator("#back").is_disabled()  # nothing was skipped


@pytest.mark.parametrize(("scheme", "width"), [("dark", 1280), ("light", 390)])
def test_axe_finds_nothing_serious(running: Running, scheme: str, width: int) -> None:
    with open_browser(scheme=scheme, width=width) as browser:
        page = browser.page
        page.goto(running.url)
        assert browser.serious() == []
        page.fill("#prompt", PROMPT)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#active-rows tr")
        page.locator("#active-rows button").nth(1).click()
        page.wait_for_selector(".change-table")
        page.click("#explain")
        page.wait_for_selector("#explanation .tag")
        assert browser.serious() == []
        page.click("#active-rows .feature-name")
        page.wait_for_selector("#unseen .context")
        assert browser.serious() == []
        page.click("#tab-compare")
        page.fill("#other", "The import of another")
        page.click("#compare-go")
        page.wait_for_selector("#compare-features tr")
        assert browser.serious() == []
        page.click("#tab-steer")
        page.fill("#steer-add", "raises")
        page.wait_for_selector("#steer-editor .results button")
        assert browser.serious() == []
        page.press("#steer-add", "Enter")
        page.fill("#steer-new", "2")
        page.click("#steer-go")
        page.wait_for_selector("#steer-export:not([hidden])")
        page.click("#steer-export button[aria-label='export as Python']")
        assert browser.serious() == []
        for tab, ready in (
            ("#tab-features", "#cards article"), ("#tab-review", "#review-card article"),
        ):  # fmt: skip
            page.click(tab)
            page.wait_for_selector(ready)
            assert browser.serious() == []
        page.goto(running.url + "nothing")
        assert browser.serious() == []


def test_hostile_text_does_nothing(running_hostile: Running) -> None:
    with open_browser() as browser:
        page = browser.page
        page.goto(running_hostile.url)
        assert HOSTILE[:20] in str(page.text_content("h1"))
        page.fill("#prompt", HOSTILE)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#active-rows tr")
        page.locator("#active-rows button[aria-label^='take out']").first.click()
        page.wait_for_selector(".change-table")
        page.click("#explain")
        page.wait_for_selector("#explanation .tag")
        page.click("#active-rows .feature-name")
        page.wait_for_selector("#unseen .context")
        page.click("#tab-steer")
        page.fill("#steer-add", "img")
        page.wait_for_selector("#steer-editor .results button")
        page.press("#steer-add", "Enter")
        page.fill("#steer-new", "2")
        page.click("#steer-go")
        page.wait_for_selector("#steer-export:not([hidden])")
        page.click("#tab-compare")
        page.fill("#other", HOSTILE)
        page.click("#compare-go")
        page.wait_for_selector("#compare-features tr")
        page.click("#tab-features")
        page.wait_for_selector("#cards article")
        assert page.locator("#cards .other").count() == page.locator("#cards article").count()
        page.click("#tab-review")
        page.wait_for_selector("#review-card article")
        assert page.locator("img").count() == 0
        text = str(page.evaluate("document.body.textContent"))
        assert not set(text) & set("\u202e\u200b\x1b")
        assert "49" not in str(page.text_content("h1"))  # {{7*7}} was not evaluated
        # Nothing is wider than the window: tokens of ten thousand characters were cut.
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
        assert_quiet(browser, running_hostile.url)


def test_a_server_that_went_away_is_said_so(own_reviews: Served) -> None:
    with open_browser() as browser:
        with Running(own_reviews) as server:
            browser.page.goto(server.url)
        browser.page.fill("#prompt", PROMPT)
        browser.page.keyboard.press("Control+Enter")
        browser.page.wait_for_selector("#problem:not([hidden])")
        said = str(browser.page.text_content("#problem"))
        assert "Is `rldecoder serve` still running?" in said
