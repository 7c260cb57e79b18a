"""Cache, ledger, budget, concurrency, and going on after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rldecoder.config.llm import Budget
from rldecoder.errors import BudgetExceededError
from rldecoder.interp.llm.client import ChatClient, Parsed, Question
from rldecoder.interp.llm.estimate import DryClient, Estimate
from tests.conftest import ROOT
from tests.interp.llm.conftest import OpenClient, outcomes, questions
from tests.interp.llm.fake_server import label, said, serve


def test_answers_come_in_order_and_never_more_at_once_than_allowed(
    open_client: OpenClient,
) -> None:
    def behave(body: dict[str, object], n: int):
        number = str(body["messages"]).split("word ")[1].split('"')[0]
        return label(f"label {number}")._replace(delay=0.03 if int(number) % 2 else 0.0)

    told: list[int] = []
    with serve(behave) as server:
        client = open_client(server, concurrency=3)
        found = client.ask_all(questions(12), lambda: told.append(1))
    assert found == [Parsed(f"label {n}", None) for n in range(12)]
    assert 1 < server.most_in_flight <= 3
    assert len(told) == 12


def test_the_second_time_nothing_is_sent_or_charged(open_client: OpenClient) -> None:
    with serve(lambda body, n: label("x")) as server:
        open_client(server, price_input=1.0).ask_all(questions(3))
        again = open_client(server, price_input=1.0)
        assert again.ask_all(questions(3)) == [Parsed("x", None)] * 3
        assert len(server.bodies) == 3
        assert open_client(server, seed=4).ask_all(questions(1))
        assert len(server.bodies) == 4  # another sampling is another question
    columns = again.ledger.columns()
    assert columns["cached"][:6] == [0, 0, 0, 1, 1, 1]
    assert columns["cost"][3:6] == [0.0] * 3
    assert columns["request"][:3] == columns["request"][3:6]
    assert again.ledger.spent().requests == 4


@pytest.mark.parametrize("limit", ["max_requests", "max_tokens", "max_cost"])
def test_a_budget_stops_before_it_is_exceeded_and_a_larger_one_goes_on(
    open_client: OpenClient, limit: str
) -> None:
    with serve(lambda body, n: label("x")) as server:
        # 110 tokens each are used; what one may use at most is known before it is sent.
        prices = {"price_input": 1e6, "price_output": 1e6}
        probe = open_client(server, **prices)
        most = probe.model.count_tokens(questions(1)[0].request.messages).most + 50
        amount = 4 if limit == "max_requests" else 3 * 110 + most
        budget = Budget.model_validate({limit: amount})
        client = open_client(server, budget, **prices)
        with pytest.raises(BudgetExceededError, match=limit):
            client.ask_all(questions(10))
        assert len(server.bodies) == 4
        spent = client.ledger.spent()
        used = {"max_requests": spent.requests, "max_tokens": spent.tokens, "max_cost": spent.cost}
        assert used[limit] <= amount
        # The same ledger, with room for the rest: only the rest is sent.
        richer = open_client(server, Budget.model_validate({limit: 10 * amount}), **prices)
        assert richer.ask_all(questions(10)) == [Parsed("x", None)] * 10
        assert len(server.bodies) == 10


def test_a_budget_holds_with_many_threads(open_client: OpenClient) -> None:
    with serve(lambda body, n: label("x")._replace(delay=0.01)) as server:
        client = open_client(server, Budget(max_requests=7), concurrency=8)
        with pytest.raises(BudgetExceededError):
            client.ask_all(questions(40))
    assert len(server.bodies) == 7


def test_a_budget_of_nothing_sends_nothing(open_client: OpenClient) -> None:
    with serve(lambda body, n: label("x")) as server:
        with pytest.raises(BudgetExceededError):
            open_client(server, Budget(max_requests=0)).ask_all(questions(1))
        assert not server.bodies


def test_tokens_that_a_server_does_not_count_are_taken_at_the_most(
    open_client: OpenClient,
) -> None:
    with serve(lambda body, n: said('{"label": "x"}', usage=False)) as server:
        client = open_client(server)
        client.ask_all(questions(1))
    size = sum(len(m["content"].encode()) for m in server.bodies[0]["messages"])
    assert client.ledger.spent().tokens >= size + 50


def dry(client: ChatClient, asked: list[Question[Any]]) -> Estimate:
    counting = DryClient(client)
    counting.ask_all(asked)
    return counting.total


def test_a_dry_run_sends_nothing_and_counts_what_is_then_sent(open_client: OpenClient) -> None:
    with serve(lambda body, n: label("x")) as server:
        client = open_client(server, price_input=2.0, price_output=4.0)
        asked = questions(5)
        client.ask_all(asked[:2])
        before = client.ledger.columns()
        still = dry(client, [*asked, *asked])  # a question that comes twice is sent once
        assert len(server.bodies) == 2
        assert client.ledger.columns() == before
        assert (still.requests, still.cached) == (3, 7)
        assert still.cost == pytest.approx((still.tokens_in * 2 + still.tokens_out * 4) / 1e6)
        assert still.most_cost > still.cost
        client.ask_all([*asked, *asked])
        assert len(server.bodies) == 5
        done = dry(client, asked)
        assert (done.requests, done.cached, done.cost) == (0, 5, 0.0)


def test_a_dry_run_answers_from_the_cache_or_with_a_stand_in(open_client: OpenClient) -> None:
    with serve(lambda body, n: label("x")) as server:
        client = open_client(server)
        asked = [question._replace(stand_in="y") for question in questions(3)]
        client.ask_all(asked[1:2])
        found = DryClient(client).ask_all(asked)
    assert [parsed.value for parsed in found] == ["y", "x", "y"]


def test_a_dry_run_knows_repaired_answers(open_client: OpenClient) -> None:
    with serve(lambda body, n: said("?") if len(body["messages"]) == 2 else label("x")) as server:
        client = open_client(server)
        asked = questions(1)
        assert dry(client, asked).requests == 1
        client.ask_all(asked)
        assert dry(client, asked) == Estimate(cached=1)
        assert DryClient(client).ask_all(asked) == [Parsed("x", None)]
        assert len(server.bodies) == 2


def test_no_bound_is_below_what_a_repair_really_sends(open_client: OpenClient) -> None:
    with serve(lambda body, n: said("\U0001f600<|" * 400)) as server:
        client = open_client(server)
        asked = questions(1)
        most = dry(client, asked).most_tokens
        client.ask_all(asked)
    sent = sum(len(m["content"].encode()) + 16 for b in server.bodies for m in b["messages"])
    assert sent + 2 * 50 <= most


def test_ctrl_c_waits_for_no_answer(open_client: OpenClient) -> None:
    release = threading.Event()

    def behave(body: dict[str, object], n: int):
        if n:
            release.wait(20)  # as a server that hangs, or a Retry-After of two minutes
        return label("x")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with serve(behave) as server:
        client = open_client(server, concurrency=4)
        started = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                client.ask_all(questions(30), interrupt)
            assert time.monotonic() - started < 10
        finally:
            release.set()
    assert len(server.bodies) <= 1 + 4


KILLED = """
import sys
from pathlib import Path
from rldecoder.config.llm import Budget, Endpoint
from rldecoder.interp.llm.endpoint import EndpointModel
from rldecoder.interp.llm.client import ChatClient
from rldecoder.interp.llm.storage import Database, Ledger
from tests.interp.llm.conftest import questions
folder = Path(sys.argv[2])
config = Endpoint(base_url=sys.argv[1], model="fake", api_key_env="TEST_API_KEY", concurrency=2)
database = Database(folder / "cache.sqlite")
ledger = Ledger(database, folder / "progress", Budget())
ChatClient(EndpointModel(config, 0.0), database, ledger).ask_all(questions(30))
"""


def test_after_a_kill_only_the_rest_is_asked(open_client: OpenClient, tmp_path: Path) -> None:
    with serve(lambda body, n: label("x")._replace(delay=0.05)) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, server.url, str(tmp_path)], cwd=ROOT
        )
        deadline = time.monotonic() + 60
        while len(server.bodies) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        before = len(server.bodies)
        assert 8 <= before < 30
        client = open_client(server)
        assert client.ask_all(questions(30)) == [Parsed("x", None)] * 30
        # What was on its way when the process died is asked again, and nothing else.
        assert len(server.bodies) <= 30 + 2
    seen = outcomes(client)
    assert seen.count("sent") <= 2
    # Written before it is sent: killed in between, the ledger names one too many, never too few.
    assert 0 <= client.ledger.spent().requests - len(server.bodies) <= 2
