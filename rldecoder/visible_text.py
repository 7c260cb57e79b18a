"""Token text is untrusted: it is made visible and harmless before anyone reads it."""

from __future__ import annotations

import unicodedata

# Invisible, reordering or unassigned characters: shown as their code point instead of acted upon.
HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
MAX_COMBINING_MARKS = 2
CONTROL_PICTURES = 0x2400
NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡"}


def visible_text(text: str, limit: int = 400) -> str:
    """`text` with control, bidirectional and zero-width characters made visible.

    Newlines become ↵, tabs ⇥, other control characters their Unicode pictures, and all else
    that is invisible or changes the reading order `<U+202E>`-like marks in ⟨⟩. Piles of
    combining marks are cut to two, and the whole to `limit` characters with a note of how
    many were left out. The result is plain text: HTML and terminal markup still need the
    escaping of their own writers (Jinja's autoescape, `rich.text.Text`).
    """
    shown: list[str] = []
    marks = 0
    for char in text[:limit]:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks <= MAX_COMBINING_MARKS:
            shown.append(visible_char(char))
    rest = len(text) - limit
    return "".join(shown) + (f"… (+{rest:,} characters)" if rest > 0 else "")


def visible_token(text: str, limit: int = 60) -> str:
    """A single token: as `visible_text`, and its spaces at either end are shown as ␣."""
    shown = visible_text(text, limit)
    body = shown.strip(" ")
    if not body:
        return "␣" * len(shown) or "∅"
    lead = len(shown) - len(shown.lstrip(" "))
    trail = len(shown) - len(shown.rstrip(" "))
    return "␣" * lead + body + "␣" * trail


def visible_char(char: str) -> str:
    """One character as itself, or as what stands for it."""
    if char in NAMED:
        return NAMED[char]
    if ord(char) < 0x20:
        return chr(CONTROL_PICTURES + ord(char))
    if unicodedata.category(char) in HIDDEN_CATEGORIES:
        return f"⟨U+{ord(char):04X}⟩"
    return char
