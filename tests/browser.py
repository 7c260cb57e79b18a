"""A headless Chromium for tests, watched: what it logs, what it asks for, what it opens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
REQUIRE = "RLDECODER_REQUIRE_BROWSER"
QUIET = [
    # Containers give Chromium no namespaces for its sandbox, and little shared memory.
    "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@dataclass
class Watched:
    """A page and everything it did that a user would not see."""

    page: Page
    trouble: list[str] = field(default_factory=list)
    """Console warnings and errors, uncaught exceptions, failed requests, dialogs."""
    requests: list[str] = field(default_factory=list)

    def serious(self) -> list[str]:
        """axe-core's findings of serious or critical impact, one line each."""
        found = Axe().run(self.page).response["violations"]
        return [
            f"{item['id']} ({item['impact']}): {item['nodes'][0]['html'][:200]} "
            f"{item['nodes'][0].get('failureSummary', '')[:300]}"
            for item in found
            if item["impact"] in ("serious", "critical")
        ]

    def tab_to(self, selector: str, *, back: bool = False, limit: int = 60) -> None:
        """Press Tab until the element has the focus, as a person without a mouse does."""
        for _ in range(limit):
            if self.page.evaluate("s => document.activeElement.matches(s)", selector):
                return
            self.page.keyboard.press("Shift+Tab" if back else "Tab")
        pytest.fail(f"Tab does not reach {selector}")


@contextmanager
def open_browser(*, scheme: str = "light", width: int = 1280) -> Iterator[Watched]:
    """A new page; without Chromium the test is skipped, or fails where REQUIRE is set."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        said = f"no browser is installed (looked for {', '.join(NAMES)})"
        if os.environ.get(REQUIRE):
            pytest.fail(f"{said}, and {REQUIRE} is set")
        pytest.skip(said)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        page = browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light",
            viewport={"width": width, "height": 900},
        ).new_page()
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)  # machines that do ten things at once
        watched = Watched(page)
        page.on("request", lambda request: watched.requests.append(request.url))
        page.on(
            "requestfailed",
            lambda request: (
                # The page itself aborts questions that nobody waits for any more.
                watched.trouble.append(f"failed {request.url}: {request.failure}")
                if request.failure != "net::ERR_ABORTED"
                else None
            ),
        )
        page.on("pageerror", lambda error: watched.trouble.append(f"uncaught {error}"))
        page.on("dialog", lambda dialog: watched.trouble.append(f"dialog {dialog.message}"))
        page.on(
            "console",
            lambda message: (
                watched.trouble.append(f"{message.type}: {message.text}")
                if message.type in ("error", "warning")
                else None
            ),
        )
        yield watched
        browser.close()
