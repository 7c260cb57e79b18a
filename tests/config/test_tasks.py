"""Settings of tasks that are read from files."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rldecoder.config.tasks import FileTask

TASK = {"name": "boolq", "path": "questions.parquet"}


@pytest.mark.parametrize(
    "wrong",
    [{"name": "Bool Q"}, {"name": "../x"}, {"name": ""}, {"metric": "rouge"}, {"shots": 17},
     {"max_new_tokens": 0}, {"max_prompt_tokens": 0}, {"few_shots": 1}],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        FileTask.model_validate(TASK | wrong)


def test_a_name_and_a_file_are_enough() -> None:
    assert FileTask.model_validate(TASK).metric == "exact_match"
