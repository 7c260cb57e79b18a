"""Settings of language models that label: addresses that are safe, keys that stay out."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rldecoder.config.llm import Endpoint, LocalModel, is_loopback

HERE = "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("ftp://example.org", "must start with"),
        ("https://", "must start with"),
        ("http://example.org/v1", "localhost only"),
        ("http://127.0.0.1.example.org", "localhost only"),
        ("https://user:hunter2@example.org", "no user, password"),
        ("https://example.org/v1?key=hunter2", "query"),
        ("https://example.org/v1#x", "fragment"),
    ],
)
def test_an_address_is_https_or_this_machine(url: str, what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        Endpoint(base_url=url, model="m")


def test_a_closing_slash_makes_no_other_address() -> None:
    one, other = (Endpoint(base_url=url, model="m") for url in (HERE, HERE + "/"))
    assert one == other


@pytest.mark.parametrize("name", ["sk-abc123", "lower", "", "A B", "A" * 65])
def test_a_key_is_named_and_never_given(name: str) -> None:
    with pytest.raises(ValidationError, match="the NAME of an environment variable"):
        Endpoint(base_url=HERE, model="m", api_key_env=name)


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False),
     ("example.org", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_this_machine_is_known_without_asking(host: str, here: bool) -> None:
    assert is_loopback(host) == here


@pytest.mark.parametrize("wrong", [{"model": "folder"}, {"model": "hub"}])
def test_a_local_model_has_a_source(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needs"):
        LocalModel.model_validate(wrong)


def test_what_a_request_costs_and_how_long_it_may_take_change_no_address() -> None:
    free = Endpoint(base_url=HERE, model="m", price_input=3.0, timeout_seconds=1.0, concurrency=9)
    assert free.digest_fields() == Endpoint(base_url=HERE, model="m").digest_fields()
