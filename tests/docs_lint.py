"""What README and docs/ must be, checked by `make lint`: `python -m tests.docs_lint`.

Plain lines of at most 100 characters, links and images that lead somewhere, a source under each
figure, sentences of at most 25 words on average, a budget of words, short logbook entries, Python
that compiles. Records (docs/experiments) are old: only their links, images and Python are checked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LINE, SENTENCE, WORDS, ENTRY = 100, 25, 15_000, 120
ROOT = Path(__file__).resolve().parents[1]

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


class Fault(NamedTuple):
    """What is wrong, where, and how to mend it."""

    page: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.what}"


class Line(NamedTuple):
    """A line of a page; `code` is the language of its fence, "?" where none is said, "" outside."""

    number: int
    text: str
    code: str


def lines_of(text: str) -> list[Line]:
    """The lines of a page, those of comments left out; a fence's own lines count as its code."""
    found, code = [], ""
    # Comments keep their line ends, so that numbers stay right.
    text = re.sub(r"<!--.*?-->", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence:
            found.append(Line(number, line, code or fence[1] or "?"))
            code = "" if code else fence[1] or "?"
        else:
            found.append(Line(number, line, code))
    return found


def words(text: str) -> int:
    """Tokens between spaces that have a letter or a digit: a table's bars are no words."""
    return sum(any(c.isalnum() for c in token) for token in text.split())


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    found: set[str] = set()
    for line in lines_of(text):
        if not line.code and line.text.startswith("#"):
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.text.lstrip("#").strip()).lower()
            slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
            same = sum(1 for one in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", one))
            found.add(f"{slug}-{same}" if same else slug)
    return found


def long_lines(page: str, lines: list[Line]) -> Iterator[Fault]:
    """Lines of prose over 100 characters, the targets of links and inline code not counted."""
    for line in lines:
        text = re.sub(r"\]\([^)]*\)|`[^`]*`|https?://\S+", "", line.text)
        table = line.text.lstrip().startswith(("|", "#"))
        if not line.code and not table and len(text) > LINE:
            yield Fault(page, line.number, f"{len(text)} characters: wrap at {LINE}")


def broken_links(root: Path, page: str, lines: list[Line]) -> Iterator[Fault]:
    """Relative links whose file or heading is not there, images too."""
    here = root / page
    for line in lines:
        for target in _LINK.findall("" if line.code else re.sub(r"`[^`]*`", "", line.text)):
            path, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            to = (here.parent / path) if path else here
            if not to.exists():
                yield Fault(page, line.number, f"links to {target}, which is not there")
            elif anchor and to.suffix == ".md" and anchor not in anchors(_read(to)):
                yield Fault(page, line.number, f"{target}: no such heading")


def figures_without_source(page: str, lines: list[Line]) -> Iterator[Fault]:
    """Images that no line `*Source: ...*` follows; a group of images may share one."""
    text = [line.text for line in lines]
    for at, line in enumerate(lines):
        if not line.code and _IMAGE.search(line.text):
            after = [one for one in text[at + 1 :] if one.strip() and not _IMAGE.search(one)]
            if not (after and after[0].startswith("*Source:")):
                yield Fault(
                    page, line.number, "a figure: put `*Source: which run, commit*` under it"
                )


def compiled(page: str, lines: list[Line]) -> Iterator[Fault]:
    """Blocks of Python that do not compile."""
    block: list[str] = []
    for line in lines:
        fence = line.text.lstrip().startswith("```")
        if line.code == "python" and not fence:
            block.append(line.text)
        elif fence and block:
            try:
                compile("\n".join(block), page, "exec")
            except SyntaxError as error:
                yield Fault(page, line.number, f"the Python above does not compile: {error.msg}")
            block = []


def sentence_length(lines: list[Line]) -> float:
    """Mean words a sentence, headings, tables, code and figures apart; an item ends a sentence."""
    prose = []
    for line in lines:
        text = line.text.strip()
        if line.code or text.startswith(("|", "#", "![", "*Source:")):
            prose.append("\n\n")
        elif not text or re.match(r"([-*]|\d+\.) ", text):
            prose.append("\n\n" + text + " ")
        else:
            prose.append(text + " ")
    text = re.sub(r"\]\([^)]*\)", "]", "".join(prose))
    sentences = [one for one in re.split(r"(?<=[.!?])[\"')*]*\s+|\n\n+", text) if words(one) > 1]
    return sum(map(words, sentences)) / max(1, len(sentences))


def long_entries(page: str, text: str) -> Iterator[Fault]:
    """Entries of the logbook over 120 words."""
    number = 1
    for entry in re.split(r"(?m)^(?=## )", text):
        if entry.startswith("## ") and words(entry) > ENTRY:
            what = f"an entry of {words(entry)} words: at most {ENTRY}, the rest in experiments/"
            yield Fault(page, number, what)
        number += entry.count("\n")


def faults(root: Path) -> list[Fault]:
    """All that is wrong with README, the notes beside it and docs/ below `root`."""
    docs = sorted((root / "docs").rglob("*.md"))
    beside = [root / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")]
    found: list[Fault] = []
    shown: set[Path] = set()
    budget = 0
    for path in [*(one for one in beside if one.is_file()), *docs]:
        page, text = path.relative_to(root).as_posix(), _read(path)
        lines = lines_of(text)
        record = page.startswith("docs/experiments/")
        shown |= {(path.parent / one).resolve() for one in _IMAGE.findall(text)}
        found += [*broken_links(root, page, lines), *compiled(page, lines)]
        if record:
            continue
        found += [*long_lines(page, lines), *figures_without_source(page, lines)]
        if (mean := sentence_length(lines)) > SENTENCE:
            found.append(Fault(page, 1, f"{mean:.1f} words a sentence: at most {SENTENCE}"))
        if page == "docs/logbook.md":
            found += long_entries(page, text)
        elif page == "README.md" or page.startswith("docs/"):
            budget += words(text)

    if budget > WORDS:
        found.append(Fault("docs", 1, f"{budget:,} words with README: at most {WORDS:,}"))
    for image in sorted((root / "docs" / "images").glob("*")):
        if image.resolve() not in shown:
            found.append(Fault(image.relative_to(root).as_posix(), 1, "no page shows it"))
    return found


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def main() -> int:
    """Print the faults; 1 if there are any."""
    found = faults(ROOT)
    for fault in found:
        print(fault)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
