"""Which files a source reads: names, what is left out of folders, and what is refused."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from rldecoder.data.folders import list_files
from rldecoder.errors import BadInputError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def test_what_is_left_out_of_folders_is_counted(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "B.PARQUET", "in/c.MD.gz", "d.bin", "E.BIN", "f", "g.tar.gz")
    make(tmp_path, "._a.txt", ".git/h.txt", "__MACOSX/i.txt", "in/.ipynb_checkpoints/j.md")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "a.txt")
    found = list_files([str(tmp_path)])
    assert [file.name for file in found.files] == [
        "B.PARQUET", "a.txt", "in/c.MD.gz", "linked.txt",
    ]  # fmt: skip
    assert not any(file.named for file in found.files)
    assert found.left_out == Counter(
        {
            "hidden": 4,
            ".bin": 2,
            "without a suffix": 1,
            ".tar.gz": 1,
            "not regular files": 2,
            "links to folders": 1,
        }
    )


def test_names_are_relative_and_never_twice(tmp_path: Path) -> None:
    make(tmp_path, "a/x/index.md", "a/y/index.md", "b/x/index.md", "c/index.md")
    paths = [str(tmp_path / name) for name in ("a", "b", "c/index.md", "./a", "a/x/index.md")]
    names = [file.name for file in list_files(paths).files]
    assert names == ["x/index.md", "y/index.md", f"{tmp_path}/b/x/index.md", "index.md"]
    # Another source with the same names.
    taken = {"index.md"}
    again = list_files([str(tmp_path / "c" / "index.md")], taken).files
    assert [file.name for file in again] == [str(tmp_path / "c" / "index.md")]
    assert again[0].named


def test_names_in_other_encodings_can_be_written(tmp_path: Path) -> None:
    for name in (b"/caf\xe9.txt", b"/d\x1b[2J.txt"):
        with open(os.fsencode(tmp_path) + name, "w") as file:
            file.write("text")
    first, second = list_files([str(tmp_path)]).files
    assert (first.name, second.name) == ("caf\\xe9.txt", "d\\x1b[2J.txt")
    assert first.path.read_text() == "text"


def test_named_files_that_are_not_read_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.pdf", ".hidden.txt")
    with pytest.raises(BadInputError, match=r"b\.pdf is of a kind that is not read.*\.jsonl"):
        list_files([str(tmp_path / "a.txt"), str(tmp_path / "b.pdf")])
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(BadInputError, match="no regular file"):
        list_files([str(tmp_path / "pipe.txt")])
    # What a person names is read, hidden or not.
    assert list_files([str(tmp_path / ".hidden.txt")]).files[0].named
    (tmp_path / "only").mkdir()
    make(tmp_path, "only/c.pdf")
    with pytest.raises(BadInputError, match=r"No text found.*Left out: 1 \.pdf"):
        list_files([str(tmp_path / "only")])
