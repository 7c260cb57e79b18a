"""Configs are frozen and closed, and only fields that matter reach the digest."""

from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from rldecoder.config.base import Config, free, hash_json, late


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


class Grown(Config):
    """With fields that came later: off by default, and on."""

    off: bool = late(False)
    count: int = late(16, before=0)


def test_a_later_field_is_in_the_digest_only_where_it_changes_something() -> None:
    # 0 is what was done before there was a count: such a config keeps its digest.
    assert Grown(count=0).digest_fields() == {}
    assert Grown().digest_fields() == {"count": 16}
    assert Grown(off=True, count=3).digest_fields() == {"off": True, "count": 3}


def test_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        Inner.model_validate({"c": 1})
    with pytest.raises(ValidationError):
        Inner().a = 2  # type: ignore[misc]


def test_hash_ignores_key_order() -> None:
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 1.5})


class Numbers(Config):
    """One of each kind."""

    whole: int = 1
    real: float = 1.0
    flag: bool = True
    many: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    by_name: dict[str, int] = Field(default_factory=dict)
    either: int | None = None
    inner: Inner = Inner()


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"whole": value} for value in ("1", "yes", True, 1.5, "0123", 2**63)],
        *[{"real": value} for value in ("1", "1:00:00", False, float("inf"), float("nan"))],
        *[{"flag": value} for value in ("yes", "true", 1, 0)],
        {"many": ["1"]}, {"pair": [0, float("inf")]}, {"pair": [0, "1"]}, {"by_name": {"a": True}},
        {"either": "1"}, {"inner": {"a": "1"}},
    ],
)  # fmt: skip
def test_numbers_and_booleans_are_nothing_else(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        Numbers.model_validate(wrong)
    assert "input_value" not in str(caught.value)


def test_numbers_that_are_meant_are_taken() -> None:
    found = Numbers.model_validate({"whole": 1e6, "real": 2, "many": [3], "inner": {"a": 4}})
    assert (found.whole, found.real, found.many, found.inner.a) == (1_000_000, 2.0, (3,), 4)
    assert isinstance(found.whole, int)
