"""Prompts: templates from files, and data fenced so that a model cannot take it for instructions.

Texts and labels come from documents and from models: whatever they say must stay data. They are
written as JSON in which nothing can end a line, close the fence or act as a control token of a
chat template, between two lines that carry a hash of the data, which no text can hold of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rldecoder.visible_text import HIDDEN_CATEGORIES

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).parent / "prompts"
BEGIN, END = "=== BEGIN DATA", "=== END DATA"
OPEN, CLOSE = "⟦", "⟧"
"""Marks of tokens: rare, so that text seldom holds them; where it does they become [[ and ]]."""

# Control tokens of common chat templates: servers turn these texts into tokens wherever they stand.
_CONTROL = re.compile(
    r"<\||\|>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:bos|eos|pad|unk|mask|think|tool_call)>"
    r"|<(?:start|end)_of_turn>|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\]|<｜|｜>",
    re.IGNORECASE,
)


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    """system, user or assistant."""
    content: str


class Marked(NamedTuple):
    """Tokens of a window; those at `marks` are to be marked."""

    tokens: Sequence[str]
    marks: frozenset[int]


def label_prompt(active: Sequence[Any], silent: Sequence[Any]) -> tuple[Message, ...]:
    """The labeler's prompt.

    Args:
        active: objects {"text", "strengths"} of windows with marked tokens, strongest first.
        silent: objects {"text"} of windows without.
    """
    lines = [{"active": item} for item in active] + [{"silent": item} for item in silent]
    return (_message("system", "label.system"), _message("user", "label.user", data=fenced(lines)))


def judge_prompt(kind: str, label: str, texts: Sequence[str]) -> tuple[Message, ...]:
    """The judge's prompt.

    Args:
        kind: detection, fuzzing, intruder or simulation.
        texts: windows; for simulation the tokens of one window.
    """
    name = "token" if kind == "simulation" else "piece"
    lines: list[Any] = [{"label": label}]
    lines += [{name: number, "text": text} for number, text in enumerate(texts, start=1)]
    count = len(texts)
    # Detection and fuzzing want the same form of answer.
    user = kind if kind in ("intruder", "simulation") else "judge"
    return (
        _message("system", f"{kind}.system", count=count),
        _message("user", f"{user}.user", data=fenced(lines), count=count),
    )


def repair_prompt(messages: Sequence[Message], answer: str, problem: str) -> tuple[Message, ...]:
    """The same chat with the useless answer and a request for a better one."""
    again = _message("user", "repair.user", problem=problem)
    # The answer may repeat hostile text, so it goes back as data too.
    return (*messages, Message("assistant", inert_json(answer[:500])), again)


def fenced(lines: Sequence[Any]) -> str:
    """JSON objects, one a line, between two lines that no text in them can imitate."""
    body = "\n".join(inert_json(line) for line in lines)
    name = hashlib.sha256(body.encode()).hexdigest()[:16]
    return f"{BEGIN} {name}\n{body}\n{END} {name}"


def inert_json(value: Any) -> str:
    """JSON on one line without invisible characters or control tokens; `json.loads` undoes it.

    Whatever must not appear is written as the JSON escape of the same character.
    """
    text = json.dumps(value, ensure_ascii=False)
    text = "".join(
        _escape(char) if unicodedata.category(char) in HIDDEN_CATEGORIES else char for char in text
    )
    # Control tokens begin with none of JSON's own signs but [, and there stands only in strings.
    return _CONTROL.sub(lambda found: "".join(map(_escape, found[0])), text)


def marked_text(window: Marked) -> str:
    """The window's text with runs of marked tokens between OPEN and CLOSE."""
    out, inside = [], False
    for index, token in enumerate(window.tokens):
        marked = index in window.marks
        if marked != inside:
            out.append(OPEN if marked else CLOSE)
            inside = marked
        out.append(token.replace(OPEN, "[[").replace(CLOSE, "]]"))
    return "".join(out) + (CLOSE if inside else "")


def prompts_digest() -> str:
    """SHA-256 of all templates: they are part of what decides an answer."""
    parts = [f"{path.name}\n{path.read_text('utf-8')}" for path in sorted(FOLDER.glob("*.j2"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _templates() -> jinja2.Environment:
    import jinja2  # here, because a plan only hashes the templates

    # Plain text, not HTML: nothing is escaped here, and no value is ever a template.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined, autoescape=False
    )


def _message(role: str, name: str, **values: Any) -> Message:
    marks = {"open": OPEN, "close": CLOSE, "begin": BEGIN, "end": END}
    return Message(role, _templates().get_template(f"{name}.j2").render(marks | values).strip())


def _escape(char: str) -> str:
    """The JSON escape of one character (a surrogate pair beyond the basic plane)."""
    return (
        json.dumps(char, ensure_ascii=True)[1:-1] if not char.isascii() else f"\\u{ord(char):04x}"
    )
