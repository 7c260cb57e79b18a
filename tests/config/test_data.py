"""Settings of corpora and of the activation cache: what does not fit together is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rldecoder.config.data import IngestConfig, LocalSource, SplitFractions

FOLDER = {"type": "local", "paths": ["texts"]}


@pytest.mark.parametrize("shares", [{"train": 0.8}, {"train": 0.75}, {"test": 0.01}])
def test_split_fractions_sum_to_one(shares: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="split fractions sum to"):
        SplitFractions(**shares)
    assert SplitFractions(train=0.4, validation=0.2, label=0.2, test=0.2).test == 0.2


def test_a_document_separator_is_one_line() -> None:
    with pytest.raises(ValidationError, match="no line break"):
        LocalSource.model_validate({**FOLDER, "document_separator": "--\n--"})
    assert LocalSource.model_validate({**FOLDER, "document_separator": "---\n"})


@pytest.mark.parametrize("kind", ["local", "dataset", "pydocs", "pysource"])
def test_a_source_is_told_by_its_type(kind: str) -> None:
    values: dict[str, Any] = {"type": kind}
    if kind in ("local", "dataset"):
        values |= {"paths": ["x"]} if kind == "local" else {"name": "org/name"}
    config = IngestConfig.model_validate({"sources": [values]})
    assert config.sources[0].type == kind
    with pytest.raises(ValidationError):
        IngestConfig.model_validate({"sources": [{**values, "type": "website"}]})
