"""Ten latents that nobody chose: each page says in words what is known; the sheet shows them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from benchmarks.take_pictures import SHEET_WIDTH, SILENT, sheet, ten_features
from rldecoder.artifacts.catalogue import Labels
from rldecoder.interp.shown import Shown, ShownLatents
from tests.browser import open_browser
from tests.serve.conftest import Running
from tests.stages.published import published

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def kind_of(said: Shown) -> str:
    """As the labels have it, without the page."""
    if said.is_label:
        return "label" if said.sure else "unsure label"
    return "nothing known" if SILENT in said.text else "description"


def test_ten_drawn_features_say_what_they_do(running: Running, debug_labels: Path) -> None:
    labels = published(Labels, debug_labels)
    shown = ShownLatents(labels.labels, labels.descriptions)
    with open_browser() as watched:
        browser = watched.page.context.browser
        assert browser is not None
        found = ten_features(browser, running.url, seed=0)
        picture = sheet(browser, found)

    assert len({one.latent for one in found}) == 10
    assert {one.latent: one.kind for one in found} == {
        one.latent: kind_of(shown.of(one.latent)) for one in found
    }
    assert all("fires" in one.text or "raises" in one.text for one in found)
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert width == 2 * SHEET_WIDTH
    assert height > 5 * 200  # five rows, each of which says something
