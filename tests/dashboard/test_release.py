"""The checklist says no where the manifests say no, and unknown where they are silent."""

from __future__ import annotations

from typing import Any

import pytest

from rldecoder.dashboard.release import checklist

MODEL = {"weights_sha256": "abc", "licence": "MIT"}
DOCUMENTS = [
    {"split": "train", "sha256": "a"}, {"split": "train", "sha256": "a"},
    {"split": "test", "sha256": "b"},
]  # fmt: skip


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "files": {"a": {"sha256": "0f", "size": 1}}, "seed": 1, "git_commit": "c0ffee",
        "packages": {"torch": "2"},
        "device": "cpu", "threads": 2, "resumed": False, "verdict": None, **changes,
    }  # fmt: skip


def answers(model: dict[str, Any] = MODEL, **changes: Any) -> list[bool | None]:
    """One clean stage and one with changes."""
    found = checklist({"one": manifest(), "two": manifest(**changes)}, model, DOCUMENTS)
    return [check.holds for check in found]


def test_a_clean_run_holds_everything() -> None:
    assert answers() == [True] * 10


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (0, {"files": {}}), (0, {"files": {"a": {"sha256": "0f"}, "b": {"size": 1}}}),
        (0, {"files": {"a": {"sha256": ""}}}), (1, {"seed": None}), (2, {"git_commit": "other"}),
        (3, {"packages": {"torch": "3"}}), (4, {"device": "cuda:0"}), (4, {"threads": 4}),
        (8, {"resumed": True}), (9, {"verdict": "fail"}),
    ],
)  # fmt: skip
def test_each_departure_is_named(place: int, changes: dict[str, Any]) -> None:
    found = answers(**changes)
    assert [at for at, holds in enumerate(found) if not holds] == [place]


def test_what_is_not_recorded_is_unknown_or_missing() -> None:
    assert answers(git_commit=None)[2] is None
    assert answers({})[5:7] == [False, False]


@pytest.mark.parametrize(
    ("commits", "holds", "words"),
    [
        (("c0ffee", "c0ffee"), True, "c0ffee"),
        (("c0ffee-dirty", "c0ffee-dirty"), False, "with changes not committed"),
        (("c0ffee", "c0ffee-dirty"), False, "c0ffee, c0ffee-dirty; 1 with changes"),
        (("c0ffee", "decaf"), False, "c0ffee, decaf"),
        ((None, "c0ffee-dirty"), False, "c0ffee-dirty"),
        ((None, None), None, "built outside a checkout"),
    ],
)
def test_changes_that_nobody_committed_are_no_commit(
    commits: tuple[str | None, str | None], holds: bool | None, words: str
) -> None:
    one, two = (manifest(git_commit=commit) for commit in commits)
    check = checklist({"one": one, "two": two}, MODEL, DOCUMENTS)[2]
    assert check.holds is holds
    assert words in check.detail


def test_a_file_without_its_sha256_is_named() -> None:
    spoilt = manifest(files={"a": {"sha256": "0f"}, "b.json": {"size": 1}})
    check = checklist({"one": spoilt, "two": manifest(files={})}, MODEL, DOCUMENTS)[0]
    assert check.detail == "one/b.json, two has no file"


def test_documents_in_two_splits_are_counted_from_the_rows() -> None:
    check = checklist({"one": manifest()}, MODEL, [*DOCUMENTS, {"split": "ood", "sha256": "b"}])[7]
    assert check.holds is False
    assert check.detail.startswith("4 documents, 1 of them in two")
    assert checklist({"one": manifest()}, MODEL, [])[7].holds is None
