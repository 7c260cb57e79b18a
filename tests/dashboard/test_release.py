"""The checklist says no where the manifests say no, and unknown where they are silent."""

from __future__ import annotations

from typing import Any

import pytest

from rldecoder.dashboard.release import checklist

MODEL = {"weights_sha256": "abc", "licence": "MIT"}


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "files": {"a": {}}, "seed": 1, "git_commit": "c0ffee", "packages": {"torch": "2"},
        "device": "cpu", "threads": 2, "resumed": False, "verdict": None, **changes,
    }  # fmt: skip


def answers(model: dict[str, Any] = MODEL, **changes: Any) -> list[bool | None]:
    """One clean stage and one with changes."""
    found = checklist({"one": manifest(), "two": manifest(**changes)}, model)
    return [check.holds for check in found]


def test_a_clean_run_holds_everything() -> None:
    assert answers() == [True] * 9


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (0, {"files": {}}), (1, {"seed": None}), (2, {"git_commit": "other"}),
        (3, {"packages": {"torch": "3"}}), (4, {"device": "cuda:0"}), (4, {"threads": 4}),
        (7, {"resumed": True}), (8, {"verdict": "fail"}),
    ],
)  # fmt: skip
def test_each_departure_is_named(place: int, changes: dict[str, Any]) -> None:
    found = answers(**changes)
    assert [at for at, holds in enumerate(found) if not holds] == [place]


def test_what_is_not_recorded_is_unknown_or_missing() -> None:
    assert answers(git_commit=None)[2] is None
    assert answers({})[5:7] == [False, False]
