"""The page is whole, loads nothing, and no text on it can act."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from rldecoder.dashboard.cards import Context
from rldecoder.dashboard.report import (
    ReportData,
    markdown_text,
    render_html,
    render_markdown,
    script_json,
)


class Page(HTMLParser):
    """Tags, attributes, scripts and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts and not self.scripts[-1][1]:
            self.scripts[-1] = (self.scripts[-1][0], data)
        else:
            self.text.append(data)


def test_hostile_text_stays_text(data: ReportData) -> None:
    page = Page(render_html(data))
    assert [attrs.get("type") for attrs, _ in page.scripts] == ["application/json", None]
    assert not any(tag in ("img", "iframe", "object", "form", "base") for tag, _ in page.tags)
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
    shown = "".join(page.text)
    assert "<img src=x onerror=alert(1)>" in shown
    assert "{{7*7}}" in shown
    features = json.loads(page.scripts[0][1])
    assert features[0]["label"] == data.features[0].label


def test_the_policy_allows_one_script_and_no_request(data: ReportData) -> None:
    html = render_html(data)
    page = Page(html)
    policy = next(
        str(attrs["content"])
        for tag, attrs in page.tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )
    script = page.scripts[1][1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            target = attrs.get(name)
            assert target in (None, "data:,") or target.startswith("#"), (tag, name, target)
    assert not re.search(r"@import|url\(\s*['\"]?https?:", html)
    assert "innerHTML" not in script
    assert "eval(" not in script


def test_missing_values_show_as_unknown(data: ReportData) -> None:
    text = re.sub(r"\s+", " ", "".join(Page(render_html(data)).text))
    assert text.count("unknown") >= sum(row.met is None for row in data.targets)
    for row in data.targets:
        assert row.name in text


def test_a_report_without_figures_claims_or_controls_renders(data: ReportData) -> None:
    bare = replace(
        data, figures={}, controls=None, claim_methods=[], examples=[], features=[], caveats=[]
    )
    html = render_html(bare)
    assert "<figure" not in html
    assert "Read with these caveats" not in html
    assert render_markdown(bare).startswith("# ")


def test_a_thousand_features_stay_below_15_megabytes(data: ReportData) -> None:
    """Six contexts of thirty-two tokens each, every token four characters and active."""
    window = Context(kind="top", tokens=(" tok",) * 32, heat=(0.25,) * 32, act=12.345, focus=20)
    usual = {"label": "a label of usual length " * 3, "examples": (window,) * 6}
    features = [
        data.features[0].model_copy(update=usual | {"latent": latent}) for latent in range(1000)
    ]
    html = render_html(replace(data, features=features))
    assert len(json.loads(Page(html).scripts[0][1])) == 1000
    assert len(html.encode()) < 15e6


def test_pages_are_the_same_every_time(data: ReportData) -> None:
    assert render_html(data) == render_html(data)
    assert render_markdown(data) == render_markdown(data)


@given(
    st.recursive(
        st.text() | st.none() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_script_json_round_trips_and_cannot_end_its_element(value: object) -> None:
    text = script_json(value)
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == value


def test_markdown_has_every_target_and_no_raw_html(data: ReportData) -> None:
    text = render_markdown(data)
    for row in data.targets:
        assert f"| {row.name} |" in text
    assert "| unknown |" in text
    assert markdown_text("a|b <i> `c` [d](e)\nf") == ("a\\|b \\<i\\> \\`c\\` \\[d\\](e)↵f")
