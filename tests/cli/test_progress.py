"""Bars show speed and time left; untrusted text is inert; a tee reaches everyone."""

from __future__ import annotations

import io

from rldecoder.cli.progress import RichReporter
from rldecoder.reporting import SilentReporter, TeeReporter
from rldecoder.terminal import Terminal


def test_rich_reporter_escapes_markup_and_shows_bar() -> None:
    text = io.StringIO()
    console = Terminal(file=text, force_terminal=True, width=140)
    reporter = RichReporter(console)
    with reporter.track("train_sae [bold]", total=4, unit="tok") as bar:
        bar.advance(2, note="[red]fvu 0.5[/red]")
        bar.advance(2)
    reporter.note("plain [link=x]")
    reporter.alert("NaN soon")
    shown = text.getvalue()
    assert "train_sae [bold]" in shown
    assert "plain [link=x]" in shown
    assert "alert:" in shown


def test_tee_reaches_everyone() -> None:
    first, second = SilentReporter(), SilentReporter()
    tee = TeeReporter([first, second])
    with tee.track("x", total=None) as bar:
        bar.advance()
    tee.metrics("s", 1, {"a": 1.0})
    tee.note("n")
    tee.alert("a")
    assert (first.notes, second.alerts) == (["n"], ["a"])
