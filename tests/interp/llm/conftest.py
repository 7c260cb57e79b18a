"""Sessions with a fake server, and the windows of planted features that a judge is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rldecoder.config.llm import Budget, Endpoint, LlmConfig
from rldecoder.interp.llm.backends import ChatRequest
from rldecoder.interp.llm.client import ChatClient, Question
from rldecoder.interp.llm.endpoint import EndpointModel
from rldecoder.interp.llm.items import ItemSampler
from rldecoder.interp.llm.parsing import LABEL_SCHEMA, parse_label
from rldecoder.interp.llm.prompts import label_prompt
from rldecoder.interp.llm.storage import Database, Ledger
from rldecoder.interp.scores import ScoringText
from tests.interp.llm.fake_server import KEY, FakeServer

if TYPE_CHECKING:
    from tests.interp.conftest import Planted

OpenClient = Callable[..., ChatClient]
CONFIG = LlmConfig(judge_windows=4, planted_features=16, min_planted=8)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", KEY)


@pytest.fixture
def open_client(tmp_path: Path) -> OpenClient:
    """A client with a server; settings of the endpoint by name, and a budget."""

    def open_(server: FakeServer, budget: Budget | None = None, **settings: Any) -> ChatClient:
        values = {"api_key_env": "TEST_API_KEY", "concurrency": 1}
        config = Endpoint(base_url=server.url, model="fake", **(values | settings))
        database = Database(tmp_path / "cache.sqlite")
        ledger = Ledger(database, tmp_path / "progress", budget or Budget())
        return ChatClient(EndpointModel(config, 0.0), database, ledger)

    return open_


@pytest.fixture(scope="module")
def sampler(planted: Planted) -> ItemSampler:
    """Windows of 16 tokens of the text that labels are scored on."""
    text = ScoringText(planted.scored.grid, planted.vocabulary, 16)
    return ItemSampler(text)


def questions(count: int) -> list[Question[str | None]]:
    """Different questions for labels."""
    return [
        Question(
            ChatRequest("label", n, label_prompt([{"text": f"word {n}"}], []), 50, LABEL_SCHEMA),
            parse_label,
        )
        for n in range(count)
    ]


def outcomes(client: ChatClient) -> list[str]:
    """The ledger's outcomes, oldest first."""
    return list(client.ledger.columns()["outcome"])
