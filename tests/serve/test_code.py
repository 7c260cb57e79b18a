"""The Python that the page offers is run, and gives the numbers that the page shows."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from rldecoder import Run
from rldecoder.config.run import load_run_config
from rldecoder.run import open_run, python_lines
from rldecoder.serve.served import Served
from rldecoder.visible_text import visible_text, visible_token
from tests.conftest import ROOT
from tests.serve.conftest import HOSTILE, PROMPT, client_of

OTHER = "The import of another"
NAUGHTY = "a'''; import os \"\"\" \\ {x} \n # 'end"


def ran(code: str) -> dict[str, Any]:
    """What the program's names are at its end."""
    assert code.isascii()
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    names: dict[str, Any] = {}
    exec(compile(code, "page.py", "exec"), names)  # what a user would do with it
    return names


def ask(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_position_an_explanation_and_a_feature(
    client: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    target = {"token": 7, "minus": 9}
    found = ask(client, "/api/position", prompt=PROMPT, position=4, target=target)
    features = ran(found["code"])["features"]
    assert [one.latent for one in features] == [one["latent"] for one in found["features"]]
    assert [one.effect for one in features] == pytest.approx(
        [one["effect"] for one in found["features"]], abs=1e-6
    )
    said = ask(client, "/api/explain", prompt=PROMPT, position=4)
    explanation = ran(said["code"])["explanation"]
    assert explanation.kl == pytest.approx(said["kl"], abs=1e-6)
    assert visible_text(explanation.says, 600) == said["says"]

    capsys.readouterr()
    page = client.get("/api/features/5").json()
    names = ran(page["code"])
    assert [visible_token(token, 24) for token in names["raised"]] == page["promoted"]
    contexts = client.get("/api/features/5/contexts").json()
    assert names["found"].firings == contexts["firings"]
    assert [one.act for one in names["found"].contexts] == pytest.approx(
        [one["act"] for one in contexts["contexts"]], abs=1e-3
    )
    assert str(names["found"].contexts[0].act) in capsys.readouterr().out


@pytest.mark.parametrize("where", ["here", "from", "all"])
def test_an_intervention(client: TestClient, where: str) -> None:
    features = ask(client, "/api/position", prompt=PROMPT, position=4)["features"]
    changes = [
        {"latent": features[0]["latent"], "how": "scale", "value": 2.5},
        {"latent": features[1]["latent"], "how": "clamp", "value": 2.0, "high": None},
        {"latent": 200, "how": "set", "value": 1.5},
    ]
    target = {"token": 7}
    found = ask(
        client, "/api/intervene", prompt=PROMPT, position=4, where=where, changes=changes,
        target=target,
    )  # fmt: skip
    mine = ran(found["code"])["found"]
    for shown, change in ((found["frozen"], mine.frozen), (found["decoder"], mine.decoder)):
        assert change.effect == pytest.approx(shown["effect"], abs=1e-6)
        assert list(change.moved) == pytest.approx(shown["moved"], abs=1e-6)
        assert [s.after for s in change.shifts] == pytest.approx(
            [s["after"] for s in shown["shifts"]], abs=1e-6
        )


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_steered_text(client: TestClient, temperature: float) -> None:
    changes = [
        {"latent": 5, "how": "set", "value": 6.0},
        {"latent": 9, "how": "clamp", "value": 0.0, "high": 0.5},
        {"latent": 12, "how": "scale", "value": -2.0},
    ]
    answer = client.post(
        "/api/steer",
        json={"prompt": PROMPT, "changes": changes, "start": 2, "new_tokens": 5,
              "temperature": temperature, "seed": 4},
    )  # fmt: skip
    last = ast.literal_eval(
        answer.text.splitlines()[-1].replace("true", "True").replace("false", "False")
    )
    texts = ran(last["code"])["texts"]
    shown = {(one["model"], one["changed"]): one["text"] for one in last["texts"]}
    assert {key: visible_text(text, 20_000) for key, text in texts.items()} == shown
    assert shown["frozen", True] != shown["frozen", False]


def test_two_prompts(client: TestClient) -> None:
    found = ask(client, "/api/compare", prompt=PROMPT, other=OTHER, position=3, other_position=2)
    mine = ran(found["code"])["found"]
    assert [one.latent for one in mine.features] == [one["latent"] for one in found["features"]]
    assert [one.difference for one in mine.features] == pytest.approx(
        [one["difference"] for one in found["features"]], abs=1e-6
    )
    assert mine.decoder.kl == pytest.approx(found["decoder"]["kl"], abs=1e-6)


@pytest.mark.parametrize("text", [NAUGHTY, HOSTILE])
def test_a_prompt_is_data_and_never_code(client: TestClient, text: str) -> None:
    for path, body in (
        ("/api/position", {"position": 2}), ("/api/compare", {"other": text}),
    ):  # fmt: skip
        code = ask(client, path, prompt=text, **body)["code"]
        assert code.isascii()
        constants = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
        assert text in constants
        calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
        assert set(calls) <= {
            "rldecoder.open_run", "run.read", "print", "reading.features", "first.compare",
        }  # fmt: skip


def test_a_run_with_settings_of_its_own_is_opened_with_them(
    debug_store: Path, served: Served, own_reviews: Served
) -> None:
    config = ROOT / "configs" / "debug.yaml"
    overrides = ["train_sae.k=8", "description='ö\"x'"]
    run = open_run(load_run_config(config, overrides), debug_store)
    assert run.python == ()  # nobody said where the settings came from
    names: dict[str, Any] = {}
    lines = python_lines(config, run.store, overrides)
    assert all(line.isascii() for line in lines)
    exec("import rldecoder\n" + "\n".join(lines), names)
    again = names["run"]
    assert isinstance(again, Run)
    assert again.config == run.config
    assert again.store.root == run.store.root
    code = own_reviews.code.feature(3)
    assert code == served.code.feature(3)
    page = client_of(own_reviews).get("/api/features/3").json()
    assert page["code"] == code
