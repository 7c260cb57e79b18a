"""The docs' pictures of report, server and figures, taken anew from a finished run.

    python -m benchmarks.take_pictures configs/quickstart.yaml --store artifacts --out docs/images

Besides, ten latents of the whole dictionary, drawn by a seed and not chosen: the page of each is
opened, must say in words what the latent does, and goes into one sheet (`ten_features.png`). How
many have a label, and how many a description only, is printed. The notebook's and Prefect's
pictures are taken by hand.
"""

from __future__ import annotations

import base64
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import urlencode

import typer
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.pages import QUIET, chromium, serving
from rldecoder import open_run
from rldecoder.artifacts.catalogue import Report
from rldecoder.config.run import load_run_config

WIDTH = 1280
PATIENCE_MS = 180_000
"""A busy machine may take that long for one answer."""
PROMPT = "The doctor told him that he should drink more"
STEERED = "The doctor told him that he should"
COMPARED = ("The train to Paris leaves at", "The train to Paris leaves from")
FIGURES = {
    "architecture.svg": "architecture.svg",
    "sae.svg": "sae_curves.svg",
    "ppo_task.svg": "ppo_curves.svg",
    "arms.svg": "arms.svg",
    "coverage.svg": "coverage.svg",
}
"""Of the stage `report`, and their names in the docs."""

SILENT = "fires on none of the text that was read"
"""What a page says of a latent of which nothing is known."""
SHEET_WIDTH = 760
"""Of a page on the sheet, pixels."""
# What tells most stays; the sheet would be three times as long with all of it.
SHORTEN = """() => {
  document.querySelectorAll("#unseen .context").forEach((one, place) => {
    if (place > 2) one.remove();
  });
  const wanted = (part) => part.matches("p:first-child, ul, #unseen")
    || [...part.querySelectorAll("h4")].some((title) => title.textContent.includes("What it does"));
  [...document.getElementById("feature-body").children].forEach((part) => {
    if (!wanted(part)) part.remove();
  });
  ["feature-back", "feature-export"].forEach((id) => document.getElementById(id).remove());
}"""


def main(
    config: Annotated[Path, typer.Argument(help="Of a finished run.")],
    store: Annotated[Path, typer.Option(help="Its store; nothing is written there.")],
    out: Annotated[Path, typer.Option(help="A folder for the pictures.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="As the run was given.")
    ] = None,
    words: Annotated[str, typer.Option(help="Of the label whose page is shown.")] = '"water"',
    seed: Annotated[int, typer.Option(help="Of the ten latents.")] = 0,
) -> None:
    """Take all pictures."""
    out.mkdir(parents=True, exist_ok=True)
    published = open_run(load_run_config(config, overrides or []), store).artifact(Report)
    for figure, name in FIGURES.items():
        shutil.copyfile(published.figures / figure, out / name)
    with serving(config, store, overrides or []) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=QUIET)
        for name, (height, picture) in PICTURES.items():
            page = opened(browser, WIDTH, height or 900)
            picture(page, address, words)
            _save(page.screenshot(full_page=height is None), out / name)
            page.close()
        found = ten_features(browser, address, seed)
        _save(sheet(browser, found), out / "ten_features.png")
        browser.close()

    for one in found:
        print(f"#{one.latent}: {one.kind}: {one.text}")
    counts = Counter(one.kind for one in found)
    print(", ".join(f"{count} x {kind}" for kind, count in counts.most_common()))


def _save(picture: bytes, path: Path) -> None:
    """Write a PNG with a palette: a third of the bytes, and nobody sees the difference."""
    Image.open(BytesIO(picture)).convert("RGB").quantize(128).save(path, optimize=True)


def opened(browser: Browser, width: int, height: int) -> Page:
    """A new page that waits long enough."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    return page


def _report(page: Page, address: str, words: str) -> None:
    page.goto(f"{address}report", wait_until="load")


def _prompt(page: Page, address: str, words: str) -> None:
    """The strongest feature taken out at the last token."""
    page.goto(f"{address}#{urlencode({'prompt': PROMPT})}")
    page.wait_for_selector("#active-rows tr")
    page.click("#active-rows button[aria-label^='take out'] >> nth=0")
    page.wait_for_selector(".change-table")
    expect(page.locator("#heat-meaning")).to_contain_text("moved")


def _feature(page: Page, address: str, words: str) -> None:
    """The most important feature whose sure label has the words."""
    page.goto(f"{address}#{urlencode({'view': 'features', 'words': words, 'only': 'high'})}")
    expect(page.locator("#count")).to_contain_text("labelled features")
    cards = page.locator("#cards button[aria-label$='its page']")
    if cards.count() == 0:
        raise SystemExit(f"No sure label has {words}: name another with --words.")
    cards.first.click()
    _wait_for_contexts(page)


def _steer(page: Page, address: str, words: str) -> None:
    """The same feature set to its usual high while both models write."""
    _feature(page, address, words)
    page.click("button:has-text('Steer with it')")
    page.fill("#prompt", STEERED)
    page.click("#steer-go")
    page.wait_for_selector("#steer-export:not([hidden])")


def _compare(page: Page, address: str, words: str) -> None:
    prompt, other = COMPARED
    page.goto(f"{address}#{urlencode({'view': 'compare', 'prompt': prompt, 'other': other})}")
    page.wait_for_selector("#compare-features tbody tr")


def _review(page: Page, address: str, words: str) -> None:
    page.goto(f"{address}#view=review")
    page.wait_for_selector("#review-card .context")


Take = Callable[[Page, str, str], None]
PICTURES: dict[str, tuple[int | None, Take]] = {
    "report.png": (1500, _report),
    "serve.png": (1900, _prompt),
    "serve_feature.png": (None, _feature),
    "serve_steer.png": (None, _steer),
    "serve_compare.png": (1300, _compare),
    "review.png": (None, _review),
}
"""Height in pixels, None: the whole page."""


def _wait_for_contexts(page: Page) -> None:
    """No `wait_for_function`: the server's policy lets nobody evaluate texts."""
    page.wait_for_selector("#unseen .note")
    expect(page.locator("#unseen")).not_to_contain_text("reading …")


class Looked(NamedTuple):
    """What the page of a latent says first."""

    latent: int
    kind: str
    """"label", "unsure label", "description" or "nothing known"."""
    text: str
    """The words after its number."""
    picture: bytes
    """PNG of the page, cut to what tells most."""


def ten_features(browser: Browser, address: str, seed: int, count: int = 10) -> list[Looked]:
    """The pages of latents of the whole dictionary, drawn by a seed.

    Raises:
        SystemExit: a page gives a number and no words.
    """
    page = opened(browser, SHEET_WIDTH, 900)
    page.goto(address)
    said = re.search(r"([\d,]+) latents", page.inner_text("header"))
    assert said is not None, page.inner_text("header")
    latents = random.Random(seed).sample(range(int(said[1].replace(",", ""))), count)
    page.close()
    return [_look(browser, address, latent) for latent in latents]


def _look(browser: Browser, address: str, latent: int) -> Looked:
    # A page of its own each: what the one before left cannot be mistaken for this one's.
    page = opened(browser, SHEET_WIDTH, 900)
    page.goto(f"{address}#view=features&feature={latent}")
    _wait_for_contexts(page)
    number, _, text = page.inner_text("#feature-title").strip().partition(" ")
    chip = page.inner_text("#feature-body > p .chip >> nth=0")
    text = text.strip()
    if number != f"#{latent}" or not re.search(r"\w", text):
        raise SystemExit(f"The page of latent {latent} says {number} {text!r}: that is no word.")
    kind = "label"
    if text.endswith(SILENT):
        kind = "nothing known"
    elif chip.startswith("description"):
        kind = "description"
    elif text.startswith("unsure"):
        kind = "unsure label"
    page.evaluate(SHORTEN)
    picture = page.locator("#feature-page").screenshot()
    page.close()
    return Looked(latent, kind, text, picture)


def sheet(browser: Browser, found: list[Looked]) -> bytes:
    """One PNG of all pages, two side by side."""
    images = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(one.picture).decode()}">'
        for one in found
    )
    page = opened(browser, 2 * SHEET_WIDTH, 900)
    page.set_content(
        "<style>body{margin:12px;background:#faf9f7;display:grid;gap:12px;align-items:start;"
        f"grid-template-columns:1fr 1fr}}img{{width:100%}}</style>{images}",
        wait_until="load",
    )
    picture = page.screenshot(full_page=True)
    page.close()
    return picture


if __name__ == "__main__":
    typer.run(main)
