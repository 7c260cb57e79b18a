"""Configs are frozen and closed, and only fields that matter reach the digest."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rldecoder.config.base import Config, free, hash_json


class Inner(Config):
    """Nested."""

    a: int = 1
    b: int = free(2)


class Outer(Config):
    """Holder."""

    inner: Inner = Inner()
    many: tuple[Inner, ...] = (Inner(a=3),)
    path: str = free("x")


def test_free_fields_stay_out_at_any_depth() -> None:
    assert Outer().digest_fields() == {"inner": {"a": 1}, "many": [{"a": 3}]}
    assert Outer(inner=Inner(b=9), path="y").digest_fields() == Outer().digest_fields()


def test_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        Inner.model_validate({"c": 1})
    with pytest.raises(ValidationError):
        Inner().a = 2  # type: ignore[misc]


def test_hash_ignores_key_order() -> None:
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 1.5})
