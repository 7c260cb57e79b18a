"""What is looked at stands in the page's address, whatever happens next."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from tests.browser import open_browser
from tests.serve.conftest import Running

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_what_changed_just_before_a_reload_is_in_the_address(running: Running) -> None:
    with open_browser() as browser:
        page = browser.page
        page.goto(running.url)
        page.evaluate("State.set({ view: 'features' }); State.set({ words: 'import' })")
        page.reload()
        assert "&words=import" in page.evaluate("location.hash")

        # Keys held down make fewer addresses than a browser refuses; the last one stands.
        written = page.evaluate(
            """() => {
              const write = history.replaceState.bind(history);
              let count = 0;
              history.replaceState = (...all) => { count += 1; write(...all); };
              for (let at = 0; at < 500; at += 1) State.set({ at });
              return count;
            }"""
        )
        assert written < 50
        expect(page).to_have_url(re.compile("at=499"))
        assert browser.trouble == []
