"""The checklist says no where the manifests say no, and unknown where they are silent."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rldecoder.artifacts.manifests import FileEntry, Manifest
from rldecoder.dashboard.release import Document, checklist

MODEL = {"weights_sha256": "abc", "licence": "MIT"}
FILES = {"a": FileEntry(size=1, sha256="0f" * 32)}
DOCUMENTS = [
    Document("train", "a"), Document("train", "a"), Document("test", "b"),
]  # fmt: skip


def manifest(**changes: Any) -> Manifest:
    facts: dict[str, Any] = {
        "kind": "k", "stage": "s", "digest": "d", "version": 1, "config": {}, "seed": 1,
        "inputs": {}, "fingerprint": {}, "files": FILES, "metrics": {}, "source_digest": "",
        "git_commit": "c0ffee", "packages": {"torch": "2"}, "device": "cpu", "device_name": "",
        "threads": 2, "wall_seconds": 1.0, "peak_memory_bytes": 1, "resumed": False,
        "created_at": "",
    }  # fmt: skip
    return Manifest(**(facts | changes))


def answers(model: dict[str, str] = MODEL, **changes: Any) -> list[bool | None]:
    """One clean stage and one with changes."""
    found = checklist({"one": manifest(), "two": manifest(**changes)}, DOCUMENTS, **model)
    return [check.holds for check in found]


def test_a_clean_run_holds_everything() -> None:
    assert answers() == [True] * 10


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (0, {"files": {}}), (2, {"git_commit": "other"}),
        (3, {"packages": {"torch": "3"}}), (4, {"device": "cuda:0"}), (4, {"threads": 4}),
        (8, {"resumed": True}), (9, {"verdict": "fail"}),
    ],
)  # fmt: skip
def test_each_departure_is_named(place: int, changes: dict[str, Any]) -> None:
    found = answers(**changes)
    assert [at for at, holds in enumerate(found) if not holds] == [place]


def test_what_is_not_recorded_is_unknown_or_missing() -> None:
    assert answers(git_commit=None)[2] is None
    assert answers({"weights_sha256": "", "licence": ""})[5:7] == [False, False]


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
    check = checklist({"one": one, "two": two}, DOCUMENTS, **MODEL)[2]
    assert check.holds is holds
    assert words in check.detail


def test_a_file_has_its_sha256_or_the_manifest_is_refused() -> None:
    check = checklist({"one": manifest(), "two": manifest(files={})}, DOCUMENTS, **MODEL)[0]
    assert check.detail == "two has no file"
    for file in ({"size": 1}, {"size": 1, "sha256": ""}):
        with pytest.raises(ValidationError):
            manifest(files={"b.json": file})
    with pytest.raises(ValidationError):
        manifest(seed=None)


def test_documents_in_two_splits_are_counted_from_the_rows() -> None:
    check = checklist({"one": manifest()}, [*DOCUMENTS, Document("ood", "b")], **MODEL)[7]
    assert check.holds is False
    assert check.detail.startswith("4 documents, 1 of them in two")
    assert checklist({"one": manifest()}, [], **MODEL)[7].holds is None
