"""What reaches the terminal: text of others cannot act on it.

Labels, tokens, captions, file and model names, and errors that quote them may hold escape
sequences that clear the screen, rename the window, write to the clipboard or turn the reading
order around. rich escapes its own markup and nothing else. So every console of this program is a
`Terminal`, and no single print can forget.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from rldecoder.visible_text import visible_char


def printable(text: str) -> str:
    """`text` with everything that a terminal would act on made visible; lines and tabs stay.

    Control characters become their Unicode pictures (␛ for ESC), and bidirectional, zero-width and
    unpaired surrogate characters marks like ⟨U+202E⟩.
    """
    if text.isprintable():
        return text
    return "".join(char if char in "\n\t" else visible_char(char) for char in text)


class Terminal(Console):
    """A rich console that prints other people's text as it is, and never does what it says."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does, of printable text: it is laid out as wide as it will be."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich does; whatever came past `render_str` is made printable here."""
        for segment in super().render(renderable, options):
            # Control segments are rich's own: they move its progress bars.
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


class PrintableFormatter(logging.Formatter):
    """Log lines for a terminal, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The line as usual, made printable."""
        return printable(super().format(record))
