"""Nothing that a text holds is done by the terminal, wherever the text is printed."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from rldecoder.cli.progress import RichReporter
from rldecoder.terminal import PrintableFormatter, Terminal, printable
from tests.conftest import ROOT
from tests.forked import ForkServer

ATTACKS = {
    "clear the screen": "\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;ZXZpbA==\x1b\\",
    "link": "\x1b]8;;http://evil.example\x1b\\here",
    "C1 CSI": "\x9b2J",
    "C1 OSC": "\x9d0;owned\x9c",
    "back": "safe\b\b\b\bevil",
    "return": "harmless\revil",
    "delete": "\x7f",
    "bidi": "\u202eevil\u2066\u2069",
    "invisible": "\u200b\u2060\ufeff",
    "surrogate": "\udcff",
}
ACTS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"
)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_whatever_is_printed_does_nothing(attack: str) -> None:
    """Every way a text comes to a console: markup, tables, titles, panels, bars, plain output."""
    out = io.StringIO()
    console = Terminal(file=out, width=120)
    console.print(f"[bold]a {attack} b[/bold]", highlight=False)
    table = Table(attack, title=f"t {attack}", caption=attack)
    table.add_row(f"cell {attack}")
    table.add_row(Text(attack))
    console.print(table, Panel(Text.assemble("x", (attack, "red")), title=attack))
    console.print(attack, soft_wrap=True)
    console.out(attack, highlight=False)
    console.log(attack)
    reporter = RichReporter(console)
    reporter.note(attack)
    reporter.alert(attack)
    shown = out.getvalue()
    assert not ACTS.search(shown)
    out.getvalue().encode("utf-8")


def test_bars_still_move_and_colours_are_still_colours() -> None:
    out = io.StringIO()
    console = Terminal(file=out, width=120, force_terminal=True, color_system="truecolor")
    with Progress(console=console, transient=True) as progress:
        progress.add_task("fetch \x1b]0;owned\x07", total=2, completed=1)
        progress.refresh()
    console.print("[red]wrong[/red]")
    shown = out.getvalue()
    assert "\x1b[31mwrong" in shown
    assert "\x1b[?25l" in shown
    assert "␛]0;owne" in shown
    assert "\x1b]" not in shown


def test_ordinary_text_is_left_alone() -> None:
    text = "naïve 中文 עברית 🎉 ‘x’ – ␣\n\tline"
    assert printable(text) == text
    assert printable("\x1b[2J\u202e") == "␛[2J⟨U+202E⟩"


def test_log_lines_and_their_tracebacks_are_printable() -> None:
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        record = logging.LogRecord("n", 40, "f", 1, "it broke: %s", ("\x9b2J",), sys.exc_info())
    line = PrintableFormatter().format(record)
    assert "ValueError: ␛[2J" in line
    assert not ACTS.search(line)


@pytest.mark.parametrize("command", [["status"], ["run", "--no-prefect"], ["explain"]])
def test_errors_that_quote_a_file_name_do_nothing(
    forks: ForkServer, command: list[str], tmp_path: Path
) -> None:
    named = str(tmp_path / "\x1b]0;owned\x07.yaml")
    result = forks.run(*command, named, cwd=tmp_path, env={"FORCE_COLOR": "1"})
    assert result.returncode == 2
    does_nothing(result.stderr + result.stdout)


def test_a_command_that_there_is_not_does_nothing(tmp_path: Path) -> None:
    """In a process of its own: typer reads FORCE_COLOR when it is imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "rldecoder.cli", "\x1b[2J", "\x1b]0;owned\x07.yaml"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    does_nothing(result.stderr + result.stdout)


def does_nothing(shown: str) -> None:
    """An error with colours, and no other escape."""
    assert "\x1b[" in shown
    said = re.sub(r"\x1b\[[\d;]*m", "", shown)  # colours
    assert "error:" in said
    assert not ACTS.search(said)
    assert "owned" in said or "[2J" in said or "Missing argument" in said


def test_every_console_of_the_program_is_a_terminal() -> None:
    made = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("rldecoder", "tasks", "flows")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(r"(?<![\w.])Console\(", line) and "class " not in line
    ]
    assert made == []
