"""What the commands have in common."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from rldecoder.cli.options import same_run


@pytest.mark.parametrize(
    ("store", "overrides"),
    [(None, None), ("a store; rm -rf x", ["name='a b'", "train_sae.k=8"])],
)
def test_the_same_run_is_named_for_a_shell(store: str | None, overrides: list[str] | None) -> None:
    words = shlex.split(same_run(Path("my configs/a.yaml"), store, overrides))
    expected = ["my configs/a.yaml", *([] if store is None else ["--store", store])]
    assert words == expected + [w for one in overrides or [] for w in ("--set", one)]
