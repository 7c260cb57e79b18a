"""Without Chromium the browser's tests are skipped here and fail in CI."""

from __future__ import annotations

import pytest

from tests import browser
from tests.browser import REQUIRE, open_browser
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("value", "outcome"),
    [(None, pytest.skip.Exception), ("", pytest.skip.Exception), ("1", pytest.fail.Exception)],
)
def test_no_browser(
    monkeypatch: pytest.MonkeyPatch, value: str | None, outcome: type[BaseException]
) -> None:
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    if value is None:
        monkeypatch.delenv(REQUIRE, raising=False)
    else:
        monkeypatch.setenv(REQUIRE, value)
    with pytest.raises(outcome, match="no browser is installed"), open_browser():
        pass


def test_ci_requires_one() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines.index(f"export {REQUIRE}=1") < lines.index("make test")
