"""A researcher's afternoon in Chromium, at both widths: what the page shows is what the library
says, the address brings it back, and what is taken along is the same."""

from __future__ import annotations

import csv
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Page, expect

from rldecoder.explain.steering import Changes, Steering
from rldecoder.serve.served import Served
from rldecoder.visible_text import visible_text
from tests.browser import Watched, open_browser
from tests.serve.conftest import PROMPT, Running
from tests.serve.test_browser import assert_quiet, percent

OTHER = "The import of another"

pytestmark = [pytest.mark.browser, pytest.mark.slow]


class Desk(NamedTuple):
    """A page on a server."""

    browser: Watched
    page: Page
    server: Running


@pytest.fixture(params=[("light", 1280), ("dark", 390)], ids=["light-1280", "dark-390"])
def desk(request: pytest.FixtureRequest, running: Running) -> Iterator[Desk]:
    """In a wide light window, and in a narrow dark one; quiet, and no wider than that."""
    scheme, width = request.param
    with open_browser(scheme=scheme, width=width) as browser:
        browser.page.goto(running.url)
        yield Desk(browser, browser.page, running)
        assert_quiet(browser, running.url)
        assert browser.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def read(page: Page) -> None:
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#active-rows tr")


def texts(page: Page) -> dict[tuple[str, bool], str]:
    """What stands in the four fields, line ends as the server shows them."""
    said = {}
    for model in ("frozen", "decoder"):
        for changed, name in ((False, "plain"), (True, "changed")):
            text = str(page.text_content(f"#text-{model}-{name}"))
            said[model, changed] = text.removesuffix(" (the same)").replace("↵\n", "↵")
    return said


def test_steering_while_both_models_write(desk: Desk, own_reviews: Served) -> None:
    page, reader = desk.page, own_reviews.workbench.reader
    page.click("#tab-steer")
    page.locator(".example-prompt").first.click()  # it writes at once, unchanged
    page.wait_for_selector("#steer-export:not([hidden])")
    assert "No feature is changed" in str(page.text_content("#steer-state"))
    page.fill("#prompt", PROMPT)

    # Three features, active or not: one set, one held, one scaled.
    for latent in (5, 9, 12):
        page.fill("#steer-add", f"#{latent}")
        page.wait_for_selector(f"#steer-editor .results button[aria-label='add feature {latent}']")
        page.press("#steer-add", "Enter")
    page.fill("input[aria-label='activation of feature 5']", "6")
    page.select_option("select[aria-label='how feature 9 is changed']", "clamp")
    page.fill("input[aria-label='least activation of feature 9']", "0")
    page.fill("input[aria-label='greatest activation of feature 9']", "0.123456789")
    page.select_option("select[aria-label='how feature 12 is changed']", "scale")
    page.fill("input[aria-label='factor of feature 12']", "-2")
    page.fill("#steer-start", "3")
    page.fill("#steer-new", "6")
    page.fill("#steer-seed", "2147483647")
    page.click("#steer-go")
    page.wait_for_selector("#steer-export:not([hidden])")
    assert page.evaluate("(p => p.value === p.max)(document.getElementById('steer-progress'))")

    changes = Changes({12: -2.0}, {5: 6.0}, {9: (0.0, 0.123456789)})
    exact = {
        (model, changed): visible_text(
            Steering(
                reader.lm, reader.sae, lambda: reader.decoder,
                changes if changed else Changes(), 3,
            ).generate(PROMPT, model=model, max_new_tokens=6),
            20_000,
        )
        for model in ("frozen", "decoder")
        for changed in (False, True)
    }  # fmt: skip
    assert texts(page) == exact
    assert exact["frozen", True] != exact["frozen", False]
    assert page.locator("#text-frozen-changed mark").count() == 1  # from where it differs

    # The address alone brings everything back.
    page.reload()
    page.wait_for_selector("#steer-export:not([hidden])")
    assert texts(page) == exact
    assert page.locator("#steer-editor .changes li").count() == 3
    assert page.input_value("#steer-seed") == "2147483647"

    # What is taken along is what was asked, whatever was edited since.
    page.fill("input[aria-label='activation of feature 5']", "7")
    page.press("input[aria-label='activation of feature 5']", "Tab")
    question = json.loads(saved_as(page, "#steer-export", "JSON"))["question"]
    assert {one["latent"]: one["value"] for one in question["changes"]} == {5: 6, 9: 0, 12: -2}
    page.click("#steer-reset")
    assert page.locator("#written").is_hidden()
    expect(page).not_to_have_url(re.compile("steer="))
    expect(page.locator("#steer-editor .changes")).to_contain_text("No feature is changed yet")


def test_writing_can_be_stopped(running: Running) -> None:
    with open_browser() as browser:
        page = browser.page
        page.goto(running.url + "#view=steer")
        page.fill("#prompt", PROMPT)
        page.fill("#steer-new", "110")
        page.click("#steer-go")
        expect(page.locator("#text-frozen-plain")).not_to_have_text("…")
        page.click("#steer-stop")
        expect(page.locator("#steer-state")).to_have_text("stopped")
        assert page.locator("#steer-export").is_hidden()
        page.fill("#steer-new", "500")
        page.click("#steer-go")
        expect(page.locator("#problem")).to_contain_text("whole number from 1 to 200")
        assert browser.trouble == []


def test_a_target_of_ones_own_and_several_changes(desk: Desk, own_reviews: Served) -> None:
    page, reading = desk.page, own_reviews.workbench.read(PROMPT)
    read(page)
    at = len(reading.ids) - 1

    # Effects come first, the largest on top.
    exact = sorted(reading.features(at), key=lambda one: -abs(one.effect))
    shown = page.locator("#active-rows .feature-name").all_text_contents()
    assert shown == [f"#{one.latent}" for one in exact]

    # A predicted token becomes the target by a click; a difference is typed.
    page.locator("#frozen button").nth(1).click()
    second = reading.predictions[at].frozen[1].token_id
    expect(page.locator("#target-now")).to_contain_text("log p of “")
    expect(page).to_have_url(re.compile(f"target={second}"))
    page.fill("#target-token", "␣f")
    page.fill("#target-minus", "mp")
    page.click("#target-set")
    expect(page.locator("#target-now")).to_have_text("log p of “␣f” less that of “mp”")
    target = reading.target(" f", "mp")
    about = {f"#{one.latent}": one.effect for one in reading.features(at, target)}
    first = page.locator("#active-rows tr").first
    name = str(first.locator(".feature-name").text_content())
    assert str(first.locator("td").nth(1).text_content()) == signed(about[name])

    # Two features at once, from a token on.
    latents = [int(name.removeprefix("#")) for name in about][:2]
    page.click(f"button[aria-label='take out feature {latents[0]}']")
    page.wait_for_selector(".change-table")
    page.fill("#factor", "3")
    page.click(f"button[aria-label='amplify feature {latents[1]}']")
    page.select_option("#change-where", "all")
    changes = Changes({latents[0]: 0.0, latents[1]: 3.0})
    expect(page.locator("#change-body")).to_contain_text("at every token")
    found = reading.intervene(changes, target=target)
    expect(page.locator("#change-body")).to_contain_text(
        f"{signed(found.frozen.target[0])} → {signed(found.frozen.target[1])}, changed by "
        f"{signed(-found.frozen.effect)} nats"
    )
    before = page.inner_text("#change-body")

    # Reloading shows the same; so does whom the address is sent to.
    page.reload()
    page.wait_for_selector(".change-table")
    expect(page.locator("#change-body")).to_contain_text("at every token")
    assert page.inner_text("#change-body") == before
    assert page.locator("#change-editor .changes li").count() == 2
    page.click("text=Back to unchanged")
    expect(page).not_to_have_url(re.compile("change="))
    page.click("#target-reset")
    expect(page.locator("#target-now")).to_contain_text("likeliest")
    expect(page).not_to_have_url(re.compile("target="))


def signed(value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{abs(value):.2f}"


def test_two_prompts_side_by_side(desk: Desk, own_reviews: Served) -> None:
    page, bench = desk.page, own_reviews.workbench
    page.click("#tab-compare")
    page.fill("#prompt", PROMPT)
    page.fill("#other", OTHER)
    page.click("#compare-go")
    page.wait_for_selector("#compare-features tr")
    page.locator("#compare-second [role=option]").nth(2).click()
    expect(page.locator("#compare-where")).to_contain_text("(token 2)")
    exact = bench.read(PROMPT).compare(bench.read(OTHER), -1, 2)
    names = page.locator("#compare-features .feature-name").all_text_contents()
    assert names == [f"#{one.latent}" for one in exact.features]
    rows = page.locator("#compare-features tbody tr")
    for number, one in enumerate(exact.features[:3]):
        cells = rows.nth(number).locator("td").all_text_contents()
        assert cells[1:] == [
            f"{one.activation:.2f}", f"{one.other_activation:.2f}", signed(one.difference),
        ]  # fmt: skip
    table = page.locator("#compare-predictions .change-table").first
    shift = exact.frozen.shifts[0]
    cells = table.locator("tbody tr").first.locator("td").all_text_contents()
    assert cells[1:] == [percent(shift.before), percent(shift.after)]
    page.reload()
    page.wait_for_selector("#compare-features tr")
    expect(page.locator("#compare-where")).to_contain_text("(token 2)")
    assert page.locator("#compare-features .feature-name").all_text_contents() == names


def test_the_page_of_any_feature(desk: Desk, own_reviews: Served) -> None:
    page, catalogue = desk.page, own_reviews.catalogue
    labelled = next(f for f in catalogue.labels.features if f.kind != "none")
    known = {feature.latent for feature in catalogue.labels.features}
    unlabelled = next(latent for latent in range(256) if latent not in known)
    page.click("#tab-features")
    page.wait_for_selector("#cards article")
    assert page.locator(".predicate").count() == 0  # no raw JSON
    page.fill("#search", f"#{unlabelled}")
    expect(page.locator("#others .feature-name")).to_have_text(f"#{unlabelled}")
    page.press("#search", "Enter")
    page.wait_for_selector("#unseen .context")
    body = page.locator("#feature-body")
    expect(body).to_contain_text("description, no label")
    expect(body).not_to_contain_text("text its label was made from")
    page.go_back()
    page.wait_for_selector("#feature-list:not([hidden])")
    page.fill("#search", f"#{labelled.latent}")
    expect(page.locator("#cards article")).to_have_count(1)
    page.click("#cards article button")
    page.wait_for_selector("#unseen .context")
    for words in (
        "text never used for its label", "text its label was made from",
        "The chance that a label with its record holds is", "the decoder’s row raises",
    ):  # fmt: skip
        expect(body).to_contain_text(words)
    numbers = page.locator("details.fold", has_text="All numbers")
    assert numbers.get_attribute("open") is None  # folded
    numbers.locator("summary").click()
    expect(numbers).to_contain_text("rank by importance")
    page.reload()
    page.wait_for_selector("#unseen .context")
    expect(page.locator("#feature-title")).to_contain_text(f"#{labelled.latent}")
    page.click("text=Steer with it")
    expect(page.locator("#steer-editor .feature-name")).to_have_text(f"#{labelled.latent}")


def test_what_is_seen_is_taken_along(desk: Desk, own_reviews: Served) -> None:
    page, reading = desk.page, own_reviews.workbench.read(PROMPT)
    read(page)
    exact = reading.features(-1)
    saved = {name: saved_as(page, "#trace-export", name) for name in ("JSON", "CSV", "PNG")}
    answers = json.loads(saved["JSON"])["answers"]["features"]
    assert {one["latent"]: one["effect"] for one in answers} == pytest.approx(
        {one.latent: one.effect for one in exact}, abs=1e-6
    )
    rows = list(csv.DictReader(saved["CSV"].decode().splitlines()))
    mine = {int(r["latent"]): float(r["effect"]) for r in rows if r["table"] == "active features"}
    assert mine == pytest.approx({one.latent: one.effect for one in exact}, abs=1e-6)
    for row in rows:  # no cell is a formula
        assert not {(row["token"] or " ")[0], (row["said"] or " ")[0]} & set("=+-@\t\r")
    assert_drawn(saved["PNG"])
    page.click("#trace-export button[aria-label='export as Python']")
    code = str(page.text_content("#trace-export pre"))
    with page.expect_download() as waiting:
        page.click("text=Download .py")
    assert waiting.value.suggested_filename == "prompt.py"
    assert Path(waiting.value.path()).read_text() == code
    assert "reading.features(" in code  # tests/serve/test_code.py runs it


def test_what_is_late_or_left_does_not_show_as_something_else(running: Running) -> None:
    with open_browser() as browser:
        page = browser.page
        page.goto(running.url)
        read(page)

        # Back to an address without a target: effects are about the likeliest token again.
        page.click("#tab-steer")
        page.click("#tab-trace")
        page.locator("#frozen button").nth(1).click()
        expect(page.locator("#target-now")).to_contain_text("log p of “")
        page.go_back()
        page.go_back()
        expect(page.locator("#target-now")).to_contain_text("likeliest")
        expect(page.locator("#effect-meaning")).to_contain_text("the decoder’s first choice")

        # An explanation of another prompt's token 2 comes when this prompt's is looked at.
        held: list[Any] = []
        page.route("**/api/explain", lambda route: held.append(route))
        page.locator("#tokens [role=option]").nth(2).click()
        page.wait_for_selector("#active-rows tr")
        page.click("#explain")
        page.fill("#prompt", OTHER)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#where")).not_to_contain_text("token 2 of")
        page.locator("#tokens [role=option]").nth(2).click()
        page.wait_for_selector("#active-rows tr")
        with page.expect_response("**/api/explain"):
            held[0].continue_()
        expect(page.locator("#explain")).to_be_enabled()
        expect(page.locator("#explanation")).to_contain_text("Claims about single features")
        assert browser.trouble == []


def test_a_spreadsheet_takes_texts_for_texts_and_numbers_for_numbers(running: Running) -> None:
    cells = ["=1+1", "+1", "-cmd", "@x", "＝1", "-0.5", "1e-7", 'a "b", c', "-2", "", None, -3.5]
    with open_browser() as browser:
        page = browser.page
        page.goto(running.url)
        page.evaluate(
            """cells => {
              const box = document.createElement("div");
              box.id = "own-export";
              document.querySelector("main").append(box);
              const tables = [{ name: "t", columns: ["c"], rows: cells.map(cell => [cell]) }];
              Sheet.bar(box, () => ({ name: "own", tables }));
            }""",
            cells,
        )
        rows = list(csv.reader(saved_as(page, "#own-export", "CSV").decode().splitlines()))
        assert rows == [["table", "c"]] + [
            ["t", cell]
            for cell in (
                "'=1+1", "'+1", "'-cmd", "'@x", "'＝1", "-0.5", "1e-7", 'a "b", c', "-2", "", "",
                "-3.5",
            )
        ]  # fmt: skip


def saved_as(page: Page, bar: str, kind: str) -> bytes:
    with page.expect_download() as waiting:
        page.click(f"{bar} button[aria-label='export as {kind}']")
    return Path(waiting.value.path()).read_bytes()


def assert_drawn(png: bytes) -> None:
    """A whole picture, twice 1100 px wide, with something on it."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width == 2200
    assert height > 1000
    data, place = b"", 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + size]
        place += size + 12
    lines = zlib.decompress(data)
    assert len(set(lines[:: max(1, len(lines) // 200_000)])) > 20


def test_colours_leave_sinks_out(running: Running, own_reviews: Served) -> None:
    trace = own_reviews.workbench.read(PROMPT).predictions
    with open_browser() as browser:
        page = browser.page
        page.goto(running.url)
        read(page)
        heat = page.locator("#tokens [role=option]").evaluate_all(
            "nodes => nodes.map(n => Number(n.style.getPropertyValue('--h')))"
        )
        highest = max(one.kl for one in trace if not one.sink)
        wanted = [0.0 if one.sink else one.kl / highest for one in trace]
        assert heat == pytest.approx(wanted, abs=1e-3)
        assert heat[0] == 0
        expect(page.locator("#heat-meaning")).to_contain_text("1 attention sink left out")


REACHED = """() => {
  const shown = node => node.checkVisibility({checkVisibilityCSS: true}) &&
    !node.closest("[hidden]") && node.getBoundingClientRect().width > 1;
  const all = [...document.querySelectorAll(
    "button, input, select, textarea, summary, a[href], [role=option]")].filter(shown);
  const name = n => n.tagName + "#" + n.id + "." + n.className + " " + n.textContent.slice(0, 20);
  const touched = n => n.type === "checkbox" ? n.parentNode : n;
  const boxes = all.map(n => [n, touched(n).getBoundingClientRect()]);
  const low = boxes.filter(([, b]) => b.height < 39.5 || b.width < 39.5).map(([n]) => name(n));
  const over = [];
  boxes.forEach(([n, b], i) => boxes.slice(i + 1).forEach(([m, c]) => {
    const deep = Math.min(b.right, c.right) - Math.max(b.left, c.left) > 1 &&
      Math.min(b.bottom, c.bottom) - Math.max(b.top, c.top) > 1;
    if (deep && !n.contains(m) && !m.contains(n)) over.push(name(n) + " | " + name(m));
  }));
  const out = boxes.filter(([, b]) => b.left < 0 || b.right > innerWidth).map(([n]) => name(n));
  return {low, over, out, wide: document.documentElement.scrollWidth - innerWidth};
}"""


def test_a_telephone_shows_everything_and_fingers_reach_it(running: Running) -> None:
    with open_browser(width=390) as browser:
        page = browser.page
        page.goto(running.url)
        well: dict[str, Any] = {"low": [], "over": [], "out": [], "wide": 0}
        assert page.evaluate(REACHED) == well
        read(page)
        page.click("#active-rows button[aria-label^='take out']")
        page.wait_for_selector(".change-table")
        page.fill("#change-add", "raises")
        page.wait_for_selector("#change-editor .results button")
        page.click("#trace-export button[aria-label='export as Python']")
        assert page.evaluate(REACHED) == well
        # Rows have become cards: each value under the name of its column.
        row = page.locator("#active-rows tr").first
        assert row.evaluate("node => getComputedStyle(node).display") == "block"
        names = row.locator("td").evaluate_all(
            "nodes => nodes.map(n => getComputedStyle(n, '::before').content)"
        )
        assert names[1] == '"effect, nats"'
        page.click("text=Steer with these")
        page.fill("#steer-new", "3")
        page.click("#steer-go")
        page.wait_for_selector("#steer-export:not([hidden])")
        assert page.evaluate(REACHED) == well
        page.click("#tab-compare")
        page.fill("#other", OTHER)
        page.click("#compare-go")
        page.wait_for_selector("#compare-features tr")
        assert page.evaluate(REACHED) == well
        page.click("#compare-features .feature-name")
        page.wait_for_selector("#unseen .context")
        assert page.evaluate(REACHED) == well
        for tab, ready in (
            ("#tab-features", "#cards article"), ("#tab-review", "#review-card article"),
        ):  # fmt: skip
            page.click(tab)
            page.wait_for_selector(ready)
            assert page.evaluate(REACHED) == well
        assert_quiet(browser, running.url)
