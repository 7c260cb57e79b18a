"""Hostile token text becomes harmless and visible."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from rldecoder.visible_text import HIDDEN_CATEGORIES, visible_text, visible_token


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\nb\tc", "a↵b⇥c"),
        ("\x1b[31mred\x07", "␛[31mred␇"),
        ("\u202eevil", "⟨U+202E⟩evil"),
        ("zero\u200bwidth\ufeff", "zero⟨U+200B⟩width⟨U+FEFF⟩"),
        ("tag\U000e0041", "tag⟨U+E0041⟩"),
        ("x" + "\u0301" * 50, "x\u0301\u0301"),
        ("naïve Zürich 東京 🙂", "naïve Zürich 東京 🙂"),
        ("</script>", "</script>"),
    ],
)
def test_known_attacks(raw: str, shown: str) -> None:
    assert visible_text(raw) == shown


@given(st.text())
def test_nothing_invisible_is_left(raw: str) -> None:
    shown = visible_text(raw)
    assert not any(unicodedata.category(char) in HIDDEN_CATEGORIES for char in shown)


def test_long_text_is_cut_and_says_so() -> None:
    shown = visible_text("y" * 10_000, limit=50)
    assert shown == "y" * 50 + "… (+9,950 characters)"


@pytest.mark.parametrize(
    ("raw", "shown"), [(" the", "␣the"), ("", "∅"), ("  ", "␣␣"), ("\n", "↵"), ("a b ", "a b␣")]
)
def test_tokens_show_their_spaces(raw: str, shown: str) -> None:
    assert visible_token(raw) == shown


def test_terminal_markup_is_not_interpreted() -> None:
    console = Console(width=80, force_terminal=True)
    with console.capture() as capture:
        console.print(Text(visible_text("[bold red]boo[/] \x1b[2J")))
    assert "[bold red]boo[/]" in capture.get()
    assert "\x1b[2J" not in capture.get()
