"""The linter of docs finds what it is for, and README and docs/ pass it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs_lint import ROOT, anchors, faults, lines_of, sentence_length, words

FIGURE = "![one](images/one.svg)\n\n*Source: the test, today.*\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project without a fault."""
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "docs" / "experiments").mkdir()
    (tmp_path / "docs" / "images" / "one.svg").write_text("<svg/>")
    (tmp_path / "README.md").write_text("# One\n\nSee [two](docs/two.md#a-part-of-it).\n")
    page = f"# Two\n\n## A part of `it`\n\nShort.\n\n{FIGURE}\n```python\nx = 1\n```\n"
    (tmp_path / "docs" / "two.md").write_text(page)
    (tmp_path / "docs" / "logbook.md").write_text("# Logbook\n\n## Today: well\n\nIt went well.\n")
    return tmp_path


def test_ours_pass() -> None:
    assert faults(ROOT) == []


def test_every_record_is_in_the_index_of_records() -> None:
    folder = ROOT / "docs" / "experiments"
    index = (folder / "README.md").read_text(encoding="utf-8")
    records = {path.name for path in folder.iterdir()} - {"README.md"}
    assert [name for name in sorted(records) if f"]({name})" not in index] == []


def test_a_good_tree_has_no_fault(tree: Path) -> None:
    assert faults(tree) == []


FAULTS = {
    "a long line": ("two.md", "Aa bb. " * 20 + "\n", "wrap at 100"),
    "a link to nowhere": ("two.md", "[x](three.md)\n", "three.md, which is not there"),
    "a heading that is gone": ("two.md", "[x](../README.md#two)\n", "no such heading"),
    "an image that is gone": ("two.md", FIGURE.replace("one.svg", "2.svg"), "2.svg, which is not"),
    "a figure without source": ("two.md", "![one](images/one.svg)\n\nText.\n", "a figure: put"),
    "broken Python": ("two.md", "```python\nx = (\n```\n", "does not compile"),
    "long sentences": ("two.md", "\n".join([" ".join(["word"] * 16)] * 20) + ".\n", "a sentence"),
    "too many words": ("three.md", "A few words.\n" * 5_001, "at most 15,000"),
    "a long entry": ("logbook.md", "\n## Now\n\n" + "A word.\n" * 60, "an entry of 121 words"),
}


@pytest.mark.parametrize(("page", "added", "said"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_is_found(tree: Path, page: str, added: str, said: str) -> None:
    path = tree / "docs" / page
    path.write_text((path.read_text() if path.exists() else "# Page\n\n") + "\n" + added)
    (found,) = faults(tree)
    assert said in str(found)
    assert found.page.endswith(page) or found.page == "docs"


def test_an_image_that_no_page_shows(tree: Path) -> None:
    (tree / "docs" / "images" / "two.svg").write_text("<svg/>")
    (found,) = faults(tree)
    assert found.page == "docs/images/two.svg"


def test_records_may_be_long_but_their_links_lead_somewhere(tree: Path) -> None:
    record = tree / "docs" / "experiments" / "old.md"
    record.write_text("# Old\n\n" + "word " * 20_000 + "\n")
    assert faults(tree) == []
    record.write_text("[x](gone.md)\n")
    assert len(faults(tree)) == 1


def test_what_counts() -> None:
    assert words("| a | 1.5 | -- |") == 2
    assert anchors("# A *b*, `c_d`!\n## A\n## A\n```\n# no\n```\n") == {"a-b-c_d", "a", "a-1"}
    text = "One two.\nThree four\nfive.\n- six seven\n\n| a | b c d e f g h |\n"
    assert sentence_length(lines_of(text)) == pytest.approx((2 + 3 + 2) / 3)
    tables = "| " + "x " * 80 + "|\n```\n" + "y" * 200 + "\n```\n"
    assert [line.code for line in lines_of(tables)] == ["", "?", "?", "?"]
