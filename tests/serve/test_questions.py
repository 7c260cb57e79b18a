"""Steering, targets, two prompts, pages of features: each answer against the library's own."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from rldecoder import Run
from rldecoder.explain.inputs import LabelText
from rldecoder.explain.reading import Reading
from rldecoder.explain.steering import Changes, Steering
from rldecoder.explain.target import Target
from rldecoder.serve.served import Served
from rldecoder.serve.workbench import Workbench
from rldecoder.visible_text import visible_text
from tests.serve.conftest import HOSTILE, PROMPT, Running, client_of

OTHER = "The import of another"


def ask(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def asked_changes(reading: Reading) -> tuple[list[dict[str, Any]], Changes]:
    """A change of each kind, as the page asks for them and as the library takes them."""
    first, second = (one.latent for one in reading.features(4)[:2])
    active = set(reading.states.latents.indices[reading.states.latents.acts > 0].tolist())
    quiet = next(latent for latent in range(256) if latent not in active)
    asked: list[dict[str, Any]] = [
        {"latent": first, "how": "scale", "value": 3.0},
        {"latent": second, "how": "clamp", "value": 0.5, "high": 0.75},
        {"latent": quiet, "how": "set", "value": 4.0},
    ]
    return asked, Changes({first: 3.0}, {quiet: 4.0}, {second: (0.5, 0.75)})


def test_several_features_are_changed_here_from_here_and_everywhere(
    client: TestClient, served: Served
) -> None:
    reading = served.workbench.read(PROMPT)
    asked, changes = asked_changes(reading)
    target = Target(7, 9)
    for where, exact in (
        ("here", reading.intervene(changes, 4, target=target)),
        ("from", reading.intervene(changes, start=4, target=target)),
        ("all", reading.intervene(changes, target=target)),
    ):
        found = ask(
            client, "/api/intervene", prompt=PROMPT, position=4, where=where, changes=asked,
            target={"token": 7, "minus": 9},
        )  # fmt: skip
        assert (found["at"], found["first"]) == (exact.at, exact.first)
        for model, change in (("frozen", exact.frozen), ("decoder", exact.decoder)):
            assert found[model]["target"] == pytest.approx(change.target)
            assert found[model]["moved"] == pytest.approx(change.moved)
            assert [s["after"] for s in found[model]["shifts"]] == pytest.approx(
                [shift.after for shift in change.shifts]
            )
        assert found["about"].startswith("log p of “")
        assert " less that of “" in found["about"]
        assert abs(found["frozen"]["effect"]) > 1e-3
    open_end = [{"latent": asked[0]["latent"], "how": "clamp", "value": 2.0, "high": None}]
    found = ask(client, "/api/intervene", prompt=PROMPT, position=4, changes=open_end)
    exact = reading.intervene(Changes(clamp={asked[0]["latent"]: (2.0, math.inf)}), 4)
    assert found["new_act"] == pytest.approx(exact.new_act)


def test_effects_are_about_a_token_of_ones_own(client: TestClient, served: Served) -> None:
    text = next(t for t in served.workbench.read(PROMPT).tokens if t.startswith(" "))
    token = ask(client, "/api/token", text=text)
    assert served.workbench.reader.lm.tokenizer.decode([token["token_id"]]) == text
    found = ask(
        client, "/api/position", prompt=PROMPT, position=4, target={"token": token["token_id"]}
    )
    exact = served.workbench.read(PROMPT).features(4, Target(token["token_id"]))
    assert found["token"]["token_id"] == token["token_id"]
    assert [f["effect"] for f in found["features"]] == pytest.approx([one.effect for one in exact])
    refused = client.post("/api/token", json={"text": "two words"})
    assert refused.status_code == 400
    assert "is not one token" in refused.json()["error"]["what"]
    same = {"prompt": PROMPT, "position": 4, "target": {"token": 7, "minus": 7}}
    assert client.post("/api/position", json=same).status_code == 400


def test_both_models_write_with_and_without_changes_line_by_line(
    client: TestClient, served: Served, run: Run
) -> None:
    asked, changes = asked_changes(served.workbench.read(PROMPT))
    body = {"prompt": PROMPT, "changes": asked, "start": 3, "new_tokens": 6}
    answer = client.post("/api/steer", json=body)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    *lines, last = map(json.loads, answer.text.splitlines())
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert lines[-1]["step"] == 4 * 6
    assert len({line["text"] for line in lines}) > 12  # it came piece by piece
    texts = {(one["model"], one["changed"]): one["text"] for one in last["texts"]}
    assert len(texts) == 4
    steering = run.steer(changes.scale, set=changes.set, clamp=changes.clamp, start=3)
    for (model, changed), text in texts.items():
        exact = (steering if changed else run.steer()).generate(
            PROMPT, model=model, max_new_tokens=6
        )
        assert text == visible_text(exact, 20_000)
    assert texts["frozen", True] != texts["frozen", False]

    # What no change can alter is not written twice.
    again = client.post("/api/steer", json=body | {"changes": asked[:1]})
    *fewer, _ = map(json.loads, again.text.splitlines())
    assert [line["model"] for line in fewer if not line["changed"]] == ["frozen", "decoder"]
    drawn = client.post("/api/steer", json=body | {"temperature": 1.0, "seed": 3})
    one = json.loads(drawn.text.splitlines()[-1])["texts"][1]["text"]
    exact = steering.generate(PROMPT, max_new_tokens=6, temperature=1.0, seed=3)
    assert one == visible_text(exact, 20_000)


def test_what_cannot_be_steered_is_refused_before_a_line(client: TestClient) -> None:
    for more, words in (
        ({"changes": [{"latent": 999, "how": "scale", "value": 2}]}, "no latent 999"),
        ({"prompt": "word " * 200}, "at most 64"),
        ({"changes": [{"latent": 1, "how": "clamp", "value": 2, "high": 1}]}, "cannot be held"),
    ):
        answer = client.post("/api/steer", json={"prompt": PROMPT, "new_tokens": 4} | more)
        assert answer.status_code == 400, answer.text
        assert words in json.dumps(answer.json())


def test_a_mistake_in_the_middle_is_the_last_line(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Steering.generate

    def broken(self: Steering, *args: Any, model: str = "frozen", **more: Any) -> str:
        if model == "decoder":
            raise ZeroDivisionError("/secret/path")
        return original(self, *args, **more)

    monkeypatch.setattr(Steering, "generate", broken)
    answer = client.post("/api/steer", json={"prompt": PROMPT, "new_tokens": 2})
    assert answer.status_code == 200
    last = json.loads(answer.text.splitlines()[-1])
    assert "ZeroDivisionError" in last["error"]["why"]
    assert "/secret/path" not in answer.text


def test_who_goes_away_frees_the_models(
    own_reviews: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that closes the page ends the writing at the next token."""
    told: list[int] = []
    original = Workbench._one

    def watched(self: Workbench, *args: Any) -> str:
        *rest, tell = args

        def slow(model: Any, changed: bool, text: str, step: int) -> None:
            told.append(step)
            time.sleep(0.05)
            tell(model, changed, text, step)

        return original(self, *rest, slow)

    monkeypatch.setattr(Workbench, "_one", watched)
    with Running(own_reviews) as server:
        headers = {"origin": server.url.rstrip("/"), "x-rldecoder-token": server.app.token}
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http:
            body = {"prompt": PROMPT, "new_tokens": 40}
            with http.stream("POST", "/api/steer", json=body, headers=headers) as answer:
                assert json.loads(next(answer.iter_lines()))["step"] == 1
            found = http.post("/api/trace", json={"prompt": PROMPT}, headers=headers)
            assert found.status_code == 200
    assert 0 < len(told) < 160


def test_steering_waits_its_turn_like_any_question(
    own_reviews: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Event(), threading.Event()
    original = Workbench.read

    def slow(bench: Workbench, prompt: str) -> Reading:
        begun.set()
        assert go.wait(120)
        return original(bench, prompt)

    monkeypatch.setattr(Workbench, "read", slow)
    with client_of(own_reviews, max_waiting=0) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/api/trace", json={"prompt": PROMPT})
        assert begun.wait(60)
        busy = client.post("/api/steer", json={"prompt": PROMPT})
        go.set()
        assert first.result().status_code == 200
    assert busy.status_code == 503
    assert busy.headers["retry-after"] == "1"


def test_two_prompts_are_compared(client: TestClient, served: Served) -> None:
    first, second = served.workbench.read(PROMPT), served.workbench.read(OTHER)
    for body, at in (({}, (-1, -1)), ({"position": 3, "other_position": 2}, (3, 2))):
        found = ask(client, "/api/compare", prompt=PROMPT, other=OTHER, **body)
        exact = first.compare(second, *at)
        assert tuple(found["at"]) == exact.at
        assert len(found["tokens"]) == len(first.ids)
        assert len(found["other_tokens"]) == len(second.ids)
        assert [one["latent"] for one in found["features"]] == [o.latent for o in exact.features]
        assert [one["difference"] for one in found["features"]] == pytest.approx(
            [one.difference for one in exact.features]
        )
        assert found["frozen"]["kl"] == pytest.approx(exact.frozen.kl)
    sink = {"prompt": PROMPT, "other": OTHER, "position": 0}
    assert client.post("/api/compare", json=sink).status_code == 400


def test_a_label_below_the_bar_is_never_quoted(served: Served, own_reviews: Served) -> None:
    """In no claim, no comparison and no list of features."""
    reader = served.workbench.reader
    texts = {latent: LabelText("a low label", 0.2, False, "what is known") for latent in range(256)}
    bench = Workbench(replace(reader, labels=texts), max_tokens=64)
    client = client_of(own_reviews._replace(workbench=bench))
    said = ask(client, "/api/explain", prompt=PROMPT, position=4)
    assert "a low label" not in json.dumps(said)
    for path, body in (
        ("/api/position", {"prompt": PROMPT, "position": 4}),
        ("/api/compare", {"prompt": PROMPT, "other": OTHER}),
    ):
        features = ask(client, path, **body)["features"]
        assert {one["label"] for one in features} == {None}
        assert {one["unsure_label"] for one in features} == {"a low label"}


def test_a_labelled_feature_has_a_page_in_words(client: TestClient, served: Served) -> None:
    features = served.catalogue.labels.features
    labelled = [f for f in features if f.kind != "none"]
    assert labelled
    for feature in labelled:
        page = client.get(f"/api/features/{feature.latent}").json()
        assert page["is_label"]
        assert page["kind"] == feature.kind
        assert "That held on text" in page["kind_words"] or "Both held" in page["kind_words"]
        assert any("The chance that a label" in sentence for sentence in page["worth"])
        assert dict(page["numbers"])["rank by importance"] == str(feature.importance_rank)
        assert page["examples"]
        if feature.output is not None and feature.output.text is not None:
            drop = f"lose {feature.output.scores.drop:.2f} nats"
            assert any(drop in sentence for sentence in page["worth"])
        assert page["usual"] == pytest.approx(served.workbench.usual(feature.latent))
        assert "{" not in json.dumps(page["worth"]) + page["kind_words"]
    described = [f for f in features if f.kind == "none"]
    for feature in described:
        page = client.get(f"/api/features/{feature.latent}").json()
        assert not page["is_label"]
        assert "No label held" in page["kind_words"]


def test_contexts_are_of_text_that_no_label_saw(client: TestClient, run: Run) -> None:
    exact = run.contexts(5, count=8)
    found = client.get("/api/features/5/contexts").json()
    assert (found["split"], found["firings"]) == ("test", exact.firings)
    assert {one["kind"] for one in found["contexts"]} == {"unseen"}
    for shown, one in zip(found["contexts"], exact.contexts, strict=True):
        assert shown["act"] == pytest.approx(one.act, abs=1e-3)
        assert shown["heat"][shown["focus"]] == max(shown["heat"]) == 1.0
        assert shown["tokens"] == [visible_text(token, 40) for token in one.tokens]
    assert client.get("/api/features/256/contexts").status_code == 400


def test_any_latent_is_found_by_number_and_by_what_is_said(
    client: TestClient, served: Served
) -> None:
    labelled = {feature.latent for feature in served.catalogue.labels.features}
    quiet = next(latent for latent in range(256) if latent not in labelled)
    for words in (f"#{quiet}", str(quiet), f" #{quiet} "):
        (found,) = client.get("/api/find", params={"words": words}).json()["found"]
        assert found["latent"] == quiet
        assert not found["is_label"]
        assert found["usual"] == pytest.approx(served.workbench.usual(quiet))
    missing = client.get("/api/find", params={"words": "#256"})
    assert missing.status_code == 400
    every = client.get("/api/find", params={"words": "fires", "count": 24}).json()
    assert len(every["found"]) == 24
    assert every["more"] > 0
    first = [one["latent"] in labelled for one in every["found"]]
    assert first == sorted(first, reverse=True)  # labelled ones come first
    # However many cards hold a word, the others can be asked for by themselves.
    others = client.get("/api/find", params={"words": "fires", "count": 24, "others": True})
    assert others.json()["found"]
    assert not {one["latent"] for one in others.json()["found"]} & labelled
    nothing = client.get("/api/find", params={"words": "zzqq xx"}).json()
    assert nothing == {"found": [], "more": 0}


def test_sinks_are_told_from_other_tokens(client: TestClient) -> None:
    tokens = ask(client, "/api/trace", prompt=PROMPT)["tokens"]
    assert tokens[0]["sink"]
    assert not tokens[-1]["sink"]


def test_two_sentences_say_what_this_is_and_how_far_to_trust_it(
    client: TestClient, served: Served, run: Run
) -> None:
    first, second = served.facts.about
    for words in ("at layer 3 of 4", "256 latents", "python=="):
        assert words in first
    table = run.artifact("evaluate").faithfulness
    which = "rl" if run.artifact("freeze_decoder").freeze.which == "ppo" else "supervised"
    assert f"{100 * table['test'][which].agreement:.0f} % of tokens" in second
    assert f"KL {table['test'][which].kl:.2f} nats" in second
    assert f"(KL {table['ood'][which].kl:.2f})" in second
    assert not any(". " in sentence for sentence in (first, second))
    page = client.get("/").text
    assert first in page
    assert served.facts.examples
    assert all(prompt in page for prompt in served.facts.examples)
    assert HOSTILE not in page
