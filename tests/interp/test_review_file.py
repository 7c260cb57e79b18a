"""The file of verdicts: nothing is lost, whoever writes at the same time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.interp.review import (
    ReviewLine,
    append_review,
    merge_reviews,
    read_reviews,
)
from tests.interp.test_review import feature

WRITER = """
import sys
from pathlib import Path
from rldecoder.interp.review import ReviewLine, append_review
for latent in range(40):
    append_review(Path(sys.argv[1]), ReviewLine(
        sae_digest="abc", latent=latent, reviewer=sys.argv[2], accept=True, note="x" * 3000))
"""


def line(latent: int, reviewer: str = "ann", note: str = "") -> ReviewLine:
    return ReviewLine(sae_digest="abc", latent=latent, reviewer=reviewer, accept=True, note=note)


def test_what_is_appended_is_what_the_labels_stage_reads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "reviews.jsonl"
    written = [append_review(path, line(latent, note="ü\n\u2028\x85")) for latent in (1, 2)]
    assert read_reviews(path, "abc") == written
    given = datetime.fromisoformat(str(written[0].at))
    assert timedelta(0) <= datetime.now(UTC) - given < timedelta(minutes=1)
    (merged,) = merge_reviews([feature(1)], written)
    assert [(review.reviewer, review.at) for review in merged.reviews] == [("ann", written[0].at)]


def test_a_given_time_is_kept(tmp_path: Path) -> None:
    at = "2025-01-02T03:04:05+00:00"
    line_ = line(1).model_copy(update={"at": at})
    assert append_review(tmp_path / "r.jsonl", line_).at == at


def test_half_a_line_of_a_killed_writer_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"sae_digest": "abc", "lat')
    append_review(path, line(7))
    first, second = path.read_text().splitlines()
    assert first == '{"sae_digest": "abc", "lat'
    assert json.loads(second)["latent"] == 7
    with path.open("a") as file:
        file.write(second[:-20])  # and another one, killed at the end of the file
    notes: list[str] = []
    assert [review.latent for review in read_reviews(path, "abc", notes.append)] == [7]
    assert [note.split(" of ")[0] for note in notes] == ["Line 1", "Line 3"]


TORN = [
    b'{"sae_digest": "abc", "note": "set {}}',  # ends as a whole one would
    b'{"sae_digest": "abc", "note": "\xff\xfe"}',
    b'{"sae_digest": "abc"\0\0\0\0',
    b'{"sae_digest": "abc", "latent": 1{"sae_digest": "abc", "latent": 2}',
    b'{"":' * 100_000,
]


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
def test_a_spoilt_line_locks_out_no_other_and_is_not_deleted(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "r.jsonl"
    append_review(path, line(1))
    with path.open("ab") as file:
        file.write(torn + b"\n")
    append_review(path, line(2))
    notes: list[str] = []
    assert [review.latent for review in read_reviews(path, "abc", notes.append)] == [1, 2]
    assert [note.split(" of ")[0] for note in notes] == ["Line 2"]
    assert torn in path.read_bytes()


@pytest.mark.parametrize(
    "wrong", ["{'latent': 1}", '{"latent": 1}', "[]", "latent 4", "[" * 99_999]
)
def test_review_pages_go_on_past_what_somebody_wrote_wrongly(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(wrong)
    append_review(path, line(2))
    notes: list[str] = []
    found = read_reviews(path, "abc", notes.append, strict=False)
    assert [review.latent for review in found] == [2]
    assert notes[0].startswith("Line 1 of")


def test_a_failed_write_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    append_review(path, line(1))
    before, write = path.read_bytes(), os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 100:
            return write(file, data[:100])  # a full disk takes a part first
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(NoResourceError, match="is full"):
            append_review(path, line(2, note="x" * 950))
    assert path.read_bytes() == before
    append_review(path, line(3))
    assert [review.latent for review in read_reviews(path, "abc")] == [1, 3]


def test_a_pipe_is_no_review_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.jsonl")
    with pytest.raises(BadInputError, match="no plain file"):
        append_review(tmp_path / "r.jsonl", line(1))


def test_threads_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: append_review(path, line(n, note="y" * 9000)), range(64)))
    assert sorted(r.latent for r in read_reviews(path, "abc")) == list(range(64))


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    who = ("ann", "bob")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in who]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    found = [(r.reviewer, r.latent) for r in read_reviews(path, "abc")]
    assert len(found) == 80
    for name in who:  # each writer's own order is kept
        assert [latent for reviewer, latent in found if reviewer == name] == list(range(40))
