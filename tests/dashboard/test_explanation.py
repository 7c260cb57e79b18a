"""One explanation as a page: whole, inert, accessible."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rldecoder.dashboard.explanation import explanation_page
from rldecoder.explain.claims import CheckedClaim, Claim
from rldecoder.explain.explanation import Explanation, Prediction, Sanity
from rldecoder.explain.ranking import RankedFeature
from tests.browser import open_browser

HOSTILE = "</style></script><img src=x onerror=alert(1)>\u202e\u200b\x1b[2J{{7*7}}"


@pytest.fixture
def page() -> str:
    prediction = Prediction(HOSTILE, 1, 0.5, ((HOSTILE, 0.5), (" b", 0.25), ("W" * 10_000, 0.1)))
    claim = Claim(7, HOSTILE, 1, HOSTILE, "supports", 0.4, 0.1, HOSTILE, 0.5, 0.9)
    explanation = Explanation(
        prompt=HOSTILE,
        tokens=(HOSTILE, "b"),
        frozen=prediction,
        decoder=prediction,
        kl=0.1,
        method_a=HOSTILE,
        ranked=(
            RankedFeature(7, 2.0, 0.8, HOSTILE, 0.3),
            RankedFeature(8, 1.0, 0.0, None, None),
            RankedFeature(9, 1.0, 0.5, None, 0.2, "a guess" + HOSTILE),
        ),
        claims=(CheckedClaim(claim, 0.3, "too small to tell", -0.1),),
        method_b=HOSTILE,
        sanity=Sanity(0.3, 0.2, 0.0),
    )
    return explanation_page(explanation, "a run", [HOSTILE])


def test_the_page_says_all_and_nothing_in_it_acts(page: str) -> None:
    tags = set(re.findall(r"<([a-z0-9]+)", page))
    assert not tags & {"script", "img", "iframe", "form"}
    assert re.findall("<link[^>]*>", page) == ['<link rel="icon" href="data:,">']
    assert page.count("</style>") == 1
    assert not set(page) & set("\u202e\u200b\x1b")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:;" in page
    for text in ("#7", "#8", "not labelled; ", "first seen", "too small to tell", "KL 0.10 nats",
                 "-0.30", "unsure: a guess", "decoder +0.10"):  # fmt: skip
        assert text in page
    assert "W" * 100 not in page


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_has_no_complaint(page: str, scheme: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    with open_browser(scheme=scheme) as browser:
        browser.page.goto(file.as_uri())
        assert browser.serious() == []
        assert browser.trouble == []
        assert browser.requests == [file.as_uri()]
