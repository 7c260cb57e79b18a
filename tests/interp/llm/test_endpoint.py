"""The `openai` client against a real server that behaves badly."""

from __future__ import annotations

import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from rldecoder.config.llm import Endpoint
from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.interp.llm.client import Parsed
from rldecoder.interp.llm.endpoint import EndpointModel
from tests.interp.llm.conftest import OpenClient, outcomes, questions
from tests.interp.llm.fake_server import KEY, Answer, label, said, serve

ECHO = {"error": {"message": f"Incorrect API key provided: {KEY}", "type": "invalid_request"}}


def test_a_good_answer_and_what_was_sent(
    open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "my-organisation")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "my-project")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # where nothing listens
    with serve(lambda body, n: label("numbers")) as server:
        client = open_client(server, price_input=2.0, price_output=10.0)
        assert client.ask_all(questions(1)) == [Parsed("numbers", None)]
    [body], [headers] = server.bodies, server.headers
    assert headers["authorization"] == f"Bearer {KEY}"
    assert not {"openai-organization", "openai-project"} & set(headers)
    assert body["model"] == "fake"
    assert body["temperature"] == 0.0
    assert body["max_tokens"] == 50
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["label"]
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    ledger = client.ledger.columns()
    assert ledger["outcome"] == ["answered"]
    assert (ledger["tokens_in"], ledger["tokens_out"]) == ([100], [10])
    assert ledger["cost"] == [pytest.approx((100 * 2 + 10 * 10) / 1e6)]
    assert ledger["latency_seconds"][0] > 0


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_rate_limits_wait_as_long_as_they_say(open_client: OpenClient, form: str) -> None:
    def behave(body: object, n: int) -> Answer:
        later = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        wait = "1" if form == "seconds" else later
        return label("x") if n else Answer(429, ECHO, {"Retry-After": wait})

    with serve(behave) as server:
        client = open_client(server)
        started = time.monotonic()
        assert client.ask_all(questions(1)) == [Parsed("x", None)]
        assert time.monotonic() - started >= 0.95
    assert outcomes(client) == ["rate_limited", "answered"]
    assert client.ledger.columns()["tokens_in"] == [0, 100]  # a refusal costs nothing


def test_a_server_may_not_make_us_wait_for_hours(open_client: OpenClient) -> None:
    with serve(lambda body, n: Answer(429, ECHO, {"Retry-After": "86400"})) as server:
        client = open_client(server, max_attempts=3)
        started = time.monotonic()
        [found] = client.ask_all(questions(1))
        assert time.monotonic() - started < 5
    assert found == Parsed(None, "no answer came (rate limited)")
    assert len(server.bodies) == 1


def test_server_errors_are_tried_again_then_counted_and_never_cached(
    open_client: OpenClient,
) -> None:
    with serve(lambda body, n: Answer(500, ECHO) if n < 5 else label("late")) as server:
        client = open_client(server, max_attempts=3)
        assert client.ask_all(questions(1)) == [Parsed(None, "no answer came (server error)")]
        assert client.ask_all(questions(1)) == [Parsed("late", None)]
    assert outcomes(client) == ["server_error"] * 5 + ["answered"]
    assert client.ledger.columns()["attempt"] == [1, 2, 3, 1, 2, 3]


def test_timeouts_are_failures_and_counted_at_the_most_they_can_cost(
    open_client: OpenClient,
) -> None:
    with serve(lambda body, n: label("slow")._replace(delay=1.0)) as server:
        client = open_client(server, timeout_seconds=0.2, max_attempts=2, price_output=1.0)
        [found] = client.ask_all(questions(1))
    assert found == Parsed(None, "no answer came (timeout)")
    ledger = client.ledger.columns()
    assert ledger["outcome"] == ["timeout", "timeout"]
    assert ledger["tokens_out"] == [50, 50]
    assert min(ledger["tokens_in"]) >= len(server.bodies[0]["messages"][1]["content"].encode())
    assert min(ledger["cost"]) > 0


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        (b"<html>gateway</html>", "no answer came (server error)"),
        (b'{"choices": [', "no answer came (server error)"),
        ({"choices": []}, "no answer came (server error)"),
        ({"choices": None}, "no answer came (server error)"),
        ({"choices": [{"message": None}]}, "the answer cannot be read: there is no JSON object"),
        ([1, 2], "no answer came (server error)"),
        ({"choices": [{"message": {"content": 7}}], "usage": "?"}, "the answer cannot be read"),
    ],
    ids=str,
)
def test_bodies_that_are_no_completion(open_client: OpenClient, body: object, failure: str) -> None:
    with serve(lambda _, n: Answer(200, body)) as server:
        client = open_client(server, max_attempts=2)
        [found] = client.ask_all(questions(1))
    assert found.value is None
    assert (found.failure or "").startswith(failure)
    assert len(server.bodies) == (1 if "no answer" in failure else 2)
    assert set(client.ledger.columns()["tokens_out"]) == {50}  # it may have been charged for


def test_an_unreadable_answer_gets_one_repair(open_client: OpenClient) -> None:
    with serve(lambda body, n: label("good") if n else said("It is numbers.")) as server:
        client = open_client(server)
        assert client.ask_all(questions(1)) == [Parsed("good", None)]
        assert client.ask_all(questions(1)) == [Parsed("good", None)]  # all from the cache
    assert [m["role"] for m in server.bodies[1]["messages"]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert outcomes(client) == ["malformed", "answered", "malformed", "answered"]
    assert client.ledger.columns()["cached"] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("answer", "outcome", "failure", "requests"),
    [
        (said("nonsense"), "malformed", "the answer cannot be read: there is no JSON object", 2),
        (said(""), "malformed", "the answer cannot be read: there is no JSON object", 2),
        (said(None, refusal="I cannot help"), "refused", "the model refused", 1),
        (said("half", finish="content_filter"), "refused", "the model refused", 1),
        (said('{"label": "cut', finish="length"), "truncated", "the answer was cut off", 1),
    ],
    ids=["malformed", "empty", "refusal", "filter", "truncated"],
)
def test_useless_answers_are_failures_and_are_not_asked_again(
    open_client: OpenClient, answer: Answer, outcome: str, failure: str, requests: int
) -> None:
    with serve(lambda body, n: answer) as server:
        client = open_client(server)
        for _ in range(2):
            [found] = client.ask_all(questions(1))
            assert found.value is None
            assert (found.failure or "").startswith(failure)
    assert len(server.bodies) == requests
    assert set(outcomes(client)) == {outcome}


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_stops_everything_and_is_not_shown(
    open_client: OpenClient, status: int, tmp_path: Path
) -> None:
    with serve(lambda body, n: Answer(status, ECHO)) as server:
        client = open_client(server)
        with pytest.raises(BadInputError, match="refused the key") as caught:
            client.ask_all(questions(20))
    assert len(server.bodies) == 1
    assert "TEST_API_KEY" in caught.value.why
    shown = "".join(traceback.format_exception(caught.value)) + str(caught.value.__cause__)
    assert KEY not in shown
    assert "sk-" not in shown
    assert outcomes(client) == ["stopped"]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def test_a_missing_key_is_told_before_anything_is_sent(
    open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key")
    with serve(lambda body, n: label("x")) as server:
        client = open_client(server)
        with pytest.raises(BadInputError, match="TEST_API_KEY is not set"):
            client.ask_all(questions(1))
        assert not server.bodies
        keyless = open_client(server, api_key_env=None)
        assert keyless.ask_all(questions(1)) == [Parsed("x", None)]
    assert "sk-another" not in server.headers[0]["authorization"]


def test_wrong_addresses_and_redirects_stop(open_client: OpenClient) -> None:
    with serve(lambda body, n: label("stolen")) as other:
        moved = Answer(302, {}, {"Location": f"{other.url}/chat/completions"})
        for answer in (Answer(404, ECHO), moved):
            with serve(lambda body, n, answer=answer: answer) as server:
                client = open_client(server)
                with pytest.raises(BadInputError, match="no chat completions"):
                    client.ask_all(questions(1))
        assert not other.bodies


def test_a_server_without_schemas_is_asked_without(open_client: OpenClient) -> None:
    def behave(body: dict[str, object], n: int) -> Answer:
        return Answer(400, ECHO) if "response_format" in body else label("plain")

    with serve(behave) as server:
        client = open_client(server)
        found = client.ask_all(questions(3))
    assert found == [Parsed("plain", None)] * 3
    assert ["response_format" in body for body in server.bodies] == [True, False, False, False]


def test_a_request_that_is_refused_fails_alone(open_client: OpenClient) -> None:
    def behave(body: dict[str, object], n: int) -> Answer:
        return Answer(400, ECHO) if "word 1" in str(body["messages"]) else label("x")

    with serve(behave) as server:
        client = open_client(server, max_failed_in_a_row=2)
        found = client.ask_all(questions(3))
    assert [f.failure for f in found] == [None, "no answer came (rejected)", None]


def test_settings_that_suit_no_request_stop(open_client: OpenClient) -> None:
    with serve(lambda body, n: Answer(400, ECHO)) as server:
        client = open_client(server, max_failed_in_a_row=3, length_field="max_completion_tokens")
        with pytest.raises(NoResourceError, match="length_field"):
            client.ask_all(questions(20))
    assert len(server.bodies) == 2 * 3  # with a schema and without
    assert server.bodies[0]["max_completion_tokens"] == 50


def test_a_server_that_is_down_publishes_no_failures(open_client: OpenClient) -> None:
    with serve(lambda body, n: label("x")) as server:
        pass
    client = open_client(server, max_attempts=2, max_failed_in_a_row=3, concurrency=2)
    with pytest.raises(NoResourceError, match="3 requests in a row"):
        client.ask_all(questions(50))
    assert len(outcomes(client)) <= 2 * 5


@pytest.mark.parametrize(
    "url",
    ["http://example.org/v1", "http://127.0.0.1.example.org/v1", "ftp://localhost/v1", "localhost",
     "https://user:pass@example.org/v1", "https://example.org/v1?key=x", "http://10.0.0.1/v1",
     "http://localhost@example.org/v1"],
)  # fmt: skip
def test_unsafe_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        Endpoint(base_url=url, model="m")


@pytest.mark.parametrize(
    "url", ["https://api.openai.com/v1/", "http://localhost:8000/v1", "http://[::1]:1/v1"]
)
def test_safe_addresses_are_taken(url: str) -> None:
    assert Endpoint(base_url=url, model="m").base_url == url.rstrip("/")


def test_a_key_pasted_into_the_config_is_refused_without_repeating_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: x\nsync_tokenizer: {model: random}\nlabel_features:\n  labelers: [predicate, llm]\n"
        f"  llm: {{labeler: {{kind: endpoint, base_url: 'https://u:{KEY}@h.org', model: m, "
        f"api_key_env: {KEY}}}}}\n"
    )
    with pytest.raises(BadInputError, match="api_key_env") as caught:
        load_run_config(path)
    assert "base_url" in str(caught.value)
    assert KEY not in str(caught.value)


def test_what_decides_an_answer_is_part_of_the_cache_key_and_what_does_not_is_not() -> None:
    base = {"base_url": "https://h.org/v1", "model": "m"}
    same = {"price_input": 3.0, "timeout_seconds": 5.0, "api_key_env": "OTHER", "concurrency": 9}
    plain = EndpointModel(Endpoint(**base), 0.0).identity()
    assert EndpointModel(Endpoint(**base, **same), 0.0).identity() == plain
    for change in ({"model": "n"}, {"base_url": "https://i.org/v1"}, {"seed": 1}):
        assert EndpointModel(Endpoint(**(base | change)), 0.0).identity() != plain
    assert EndpointModel(Endpoint(**base), 0.5).identity() != plain
