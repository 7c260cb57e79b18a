"""Settings of the frozen model: one source, and no word that another would need."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rldecoder.config.model import RandomModelConfig, SyncTokenizerConfig


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"model": "folder"}, "needs `path`"),
        ({"model": "hub"}, "needs `repo`"),
        ({"model": "gpt2", "repo": "org/name"}, "only read with model: hub"),
        ({"model": "random", "path": "x"}, "not read with model: random"),
        ({"model": "hub", "repo": "org/name", "path": "x"}, "use model: folder"),
        ({"random_model": {"vocab_size": 256}}, "vocab_size"),
    ],
)
def test_sources_that_contradict_each_other_are_refused(wrong: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        SyncTokenizerConfig.model_validate(wrong)


def test_a_place_is_no_part_of_the_address_and_a_size_is() -> None:
    def address(**values: Any) -> dict[str, Any]:
        return SyncTokenizerConfig.model_validate(values).digest_fields()

    assert address(model="folder", path="a") == address(model="folder", path="b")
    wide = RandomModelConfig(d_model=128)
    assert address(model="random") != address(model="random", random_model=wide)
