"""The API: answers, searches, verdicts, refusals with a reason, one question at a time."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from rldecoder.artifacts.catalogue import Labels
from rldecoder.explain.inputs import LabelText
from rldecoder.explain.reading import Reading
from rldecoder.interp.records import Review
from rldecoder.interp.review import ReviewLine, append_review, read_reviews
from rldecoder.serve.requests import ReviewRequest
from rldecoder.serve.served import Served
from rldecoder.serve.workbench import Workbench
from rldecoder.visible_text import visible_token
from tests.serve.conftest import HOSTILE, LONG, PROMPT, catalogue_of, client_of


def ask(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def refused(client: TestClient, path: str, status: int, **body: Any) -> str:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    return " ".join(part for part in error.values() if part)


def changed(*changes: dict[str, Any]) -> dict[str, Any]:
    """A request with changes of latent 1."""
    return {"prompt": PROMPT, "position": 1, "changes": [{"latent": 1} | one for one in changes]}


def test_a_prompt_is_traced_opened_changed_and_explained(
    client: TestClient, served: Served
) -> None:
    ids = served.workbench.read(PROMPT).ids
    tokens = ask(client, "/api/trace", prompt=PROMPT)["tokens"]
    assert len(tokens) == len(ids)
    assert tokens[1]["features"]
    assert tokens[1]["frozen"][0]["p"] >= tokens[1]["frozen"][1]["p"]
    last = len(ids) - 1
    found = ask(client, "/api/position", prompt=PROMPT, position=last)
    assert found["token"]["token"] == tokens[last]["decoder"][0]["token"]
    feature = found["features"][0]
    for factor in (0, 2):
        changed = ask(
            client, "/api/intervene", prompt=PROMPT, position=last,
            changes=[{"latent": feature["latent"], "how": "scale", "value": factor}],
        )  # fmt: skip
        assert changed["new_act"] == pytest.approx(factor * feature["act"])
        if factor == 0:
            assert changed["decoder"]["effect"] == pytest.approx(feature["effect"], abs=1e-5)
    said = ask(client, "/api/explain", prompt=PROMPT, position=last)
    assert len(said["active"]) == 5
    assert said["says"].startswith("The model expects")
    assert said["decoder"]["token"] == tokens[last]["decoder"][0]["token"]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/api/trace", {}, "prompt: Field required"),
        ("/api/trace", {"prompt": ""}, "at least 1 character"),
        ("/api/trace", {"prompt": "x" * 20_001}, "at most 20000 characters"),
        ("/api/trace", {"prompt": PROMPT, "more": 1}, "more: Extra inputs"),
        ("/api/trace", {"prompt": ["x"]}, "valid string"),
        ("/api/position", {"prompt": PROMPT, "position": -1}, "greater than or equal to 0"),
        ("/api/intervene", changed({"how": "scale", "value": 21}), "from -20 to 20"),
        ("/api/intervene", changed({"how": "scale", "value": -21}), "from -20 to 20"),
        ("/api/intervene", changed({"how": "scale", "value": 1, "high": 2}), "only a clamp"),
        ("/api/intervene", changed({"how": "set", "value": 1e7}), "less than or equal"),
        ("/api/intervene", changed({"how": "add", "value": 1}), "'scale', 'set' or 'clamp'"),
        ("/api/intervene", changed(*[{"how": "set", "value": 1}] * 2), "named twice"),
        ("/api/steer", changed() | {"new_tokens": 201}, "200"),
        ("/api/steer", {"prompt": PROMPT, "start": 0}, "greater than or equal to 1"),
        ("/api/compare", {"prompt": PROMPT}, "other: Field required"),
        ("/api/token", {"text": ""}, "at least 1 character"),
        ("/api/reviews", {"latent": 1, "reviewer": "ann"}, "verdict or a better label"),
        ("/api/reviews", {"latent": 1, "reviewer": " ", "accept": True}, "say who you are"),
        ("/api/reviews", {"latent": 1, "reviewer": "a", "label": " "}, "label is empty"),
    ],
)
def test_requests_that_cannot_be_used(
    client: TestClient, path: str, body: dict[str, Any], reason: str
) -> None:
    assert reason in refused(client, path, 422, **body)


def test_numbers_that_are_none_and_text_that_is_none(client: TestClient) -> None:
    json = {"content-type": "application/json"}
    bodies = (
        b'{"prompt": "a b", "position": 1, "changes": '
        b'[{"latent": 1, "how": "set", "value": NaN}]}',
        b'{"prompt": "\\ud800 x", "position": 1}',
        b"{", b"[]", b"null", b"\xff\xfe",
    )  # fmt: skip
    for body in bodies:
        answer = client.post("/api/intervene", content=body, headers=json)
        assert answer.status_code in (400, 422), body
        assert answer.json()["error"]["what"]


def test_too_long_prompts_are_refused_with_the_limit(client: TestClient) -> None:
    said = refused(client, "/api/trace", 400, prompt="word " * 200)
    assert "at most 64" in said
    assert "--max-tokens" in said


def test_what_is_not_there(client: TestClient) -> None:
    assert "attention sink" in refused(client, "/api/position", 400, prompt=PROMPT, position=0)
    said = refused(client, "/api/position", 400, prompt=PROMPT, position=9999)
    assert "token 9999" in said
    missing = client.get("/api/features/255000")
    assert missing.status_code == 400
    assert "latents 0 to 255" in missing.json()["error"]["why"]
    assert client.get("/api/features/x").status_code == 422
    assert client.post("/", json={}).status_code == 405


def test_features_are_searched_sorted_and_paged(client: TestClient, served: Served) -> None:
    labels = served.catalogue.labels.features
    every = client.get("/api/features", params={"count": 48}).json()
    assert every["found"] == every["all"] == len(labels)
    assert [card["rank"] for card in every["cards"]] == sorted(f.importance_rank for f in labels)
    by_density = client.get("/api/features", params={"sort": "density", "count": 48}).json()
    densities = [card["density"] for card in by_density["cards"]]
    assert densities == sorted(densities, reverse=True)
    pages = [
        client.get("/api/features", params={"start": start, "count": 5}).json()["cards"]
        for start in range(0, len(labels), 5)
    ]
    assert [card["latent"] for page in pages for card in page] == [
        card["latent"] for card in every["cards"]
    ]
    one = every["cards"][3]
    found = client.get("/api/features", params={"words": f"#{one['latent']}"}).json()
    assert [card["latent"] for card in found["cards"]] == [one["latent"]]
    named = next(card for card in every["cards"] if card["label"])
    words = " ".join(named["label"].split()[:2]).upper()
    found = client.get("/api/features", params={"words": words, "count": 48}).json()
    assert named["latent"] in [card["latent"] for card in found["cards"]]
    assert found["found"] <= every["all"]
    assert client.get("/api/features", params={"words": "zzqq"}).json()["found"] == 0
    failed = client.get("/api/features", params={"only": "failed", "count": 48}).json()
    assert failed["found"] == sum(f.label is None for f in labels)
    assert client.get("/api/features", params={"count": 0}).status_code == 422
    assert client.get("/api/features", params={"what": 1}).status_code == 422


def test_any_latent_has_a_page(client: TestClient, served: Served) -> None:
    labelled = {feature.latent for feature in served.catalogue.labels.features}
    latent = next(latent for latent in range(256) if latent not in labelled)
    found = client.get(f"/api/features/{latent}").json()
    assert not found["is_label"]
    assert found["shown"].startswith("not labelled; ")
    assert found["worth"] == found["numbers"] == found["examples"] == []
    reader = served.workbench.reader
    logits = reader.lm.unembedding @ reader.decoder.W[latent]
    for name, token in (("promoted", logits.argmax()), ("suppressed", logits.argmin())):
        assert len(found[name]) == 10
        text = reader.lm.tokenizer.decode([int(token)])
        assert found[name][0] == visible_token(text, 24)


def test_verdicts_on_the_audit_are_marked_and_the_page_is_not_told(
    client: TestClient, own_reviews: Served
) -> None:
    catalogue = own_reviews.catalogue
    named = [f for f in catalogue.labels.features if f.label is not None]
    assert 0 < sum(f.audit for f in named) < len(named)
    for f in named:
        kept = ask(client, "/api/reviews", latent=f.latent, reviewer="ann", accept=True)
        assert "audit" not in kept
    lines = read_reviews(catalogue.reviews, catalogue.labels.sae_digest)
    assert {line.latent: line.audit for line in lines} == {f.latent: f.audit for f in named}
    assert '"audit"' not in client.get("/api/queue").text
    status = client.post("/api/reviews", json={
        "latent": named[0].latent, "reviewer": "ann", "accept": True, "audit": True,
    }).status_code  # fmt: skip
    assert status == 422


def test_verdicts_are_kept_with_who_and_when(
    client: TestClient, own_reviews: Served, debug_clusters: Path
) -> None:
    catalogue = own_reviews.catalogue
    before = client.get("/api/queue").json()
    first, second = (card["latent"] for card in before["cards"][:2])
    published = json.loads((debug_clusters / "review_queue.json").read_text())["entries"]
    assert [card["latent"] for card in before["cards"]] == [
        entry["latent"] for entry in published[: len(before["cards"])]
    ]
    found = client.get("/api/features", params={"sort": "review", "count": 48}).json()["cards"]
    assert [card["latent"] for card in found] == [entry["latent"] for entry in published]
    kept = ask(client, "/api/reviews", latent=first, reviewer=" ann ", accept=True, note="n")
    assert kept["at"].endswith("+00:00")
    ask(client, "/api/reviews", latent=first, reviewer="bob", accept=False)
    ask(client, "/api/reviews", latent=second, reviewer="bob", label=HOSTILE[:50])
    after = client.get("/api/queue").json()
    assert after["reviewed"] == before["reviewed"] + 2
    assert not {first, second} & {card["latent"] for card in after["cards"]}
    lines = read_reviews(catalogue.reviews, catalogue.labels.sae_digest)
    assert [(line.latent, line.reviewer, line.accept) for line in lines] == [
        (first, "ann", True), (first, "bob", False), (second, "bob", None),
    ]  # fmt: skip
    assert lines[2].label == HOSTILE[:50].strip()
    shown = client.get(f"/api/features/{first}").json()["reviews"]
    assert [review["reviewer"] for review in shown] == ["ann", "bob"]
    assert "no label to judge" in refused(
        client, "/api/reviews", 400, latent=2**30, reviewer="ann", accept=True
    )


def test_a_verdict_names_the_label_and_published_ones_stay_beside_new_ones(
    own_reviews: Served, debug_labels: Path, debug_clusters: Path, tmp_path: Path
) -> None:
    """The labels took in two verdicts, one from before they had times; the file has one more."""
    ours = own_reviews.catalogue.labels
    feature = next(f for f in ours.features if f.label is not None)
    old = {"reviewer": "ann", "accept": False, "note": "n"}
    timed = {"reviewer": "bob", "accept": True, "shown": "elsewhere", "at": "2026-01-02T00:00:00"}
    lost = {"reviewer": "dan", "accept": True}  # only in the labels: the file is another one now
    told = [Review.model_validate(r) for r in (old, timed, lost)]
    changed = [
        f.model_copy(update={"reviews": told}) if f.latent == feature.latent else f
        for f in ours.features
    ]
    folder = Path(shutil.copytree(debug_labels, tmp_path / "labels"))
    ours.model_copy(update={"features": changed}).save(Labels.labels.path(folder))
    path = tmp_path / "r.jsonl"
    for said in (old | {"at": "2025-05-05T00:00:00"}, timed):
        line = {"sae_digest": ours.sae_digest, "latent": feature.latent} | said
        append_review(path, ReviewLine.model_validate(line))
    with path.open("a") as file:
        file.write('{"sae_digest": "torn')  # by a killed writer: it must not stop the server
    catalogue = catalogue_of(folder, debug_clusters, path)
    catalogue.review(ReviewRequest(latent=feature.latent, reviewer="cem", accept=True))
    assert read_reviews(path, ours.sae_digest)[-1].shown == feature.label
    shown = catalogue.card(feature.latent).reviews
    assert [(r.reviewer, r.at is not None) for r in shown] == [
        ("dan", False), ("ann", True), ("bob", True), ("cem", True),
    ]  # fmt: skip


def test_many_reviewers_at_once_lose_nothing(client: TestClient, own_reviews: Served) -> None:
    catalogue = own_reviews.catalogue
    latents = [feature.latent for feature in catalogue.labels.features if feature.label]
    work = [(latent, name) for latent in latents for name in ("ann", "bob", "cem")]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda item: ask(
                    client, "/api/reviews", latent=item[0], reviewer=item[1], accept=True
                ),
                work,
            )
        )
    lines = read_reviews(catalogue.reviews, catalogue.labels.sae_digest)
    assert sorted((line.latent, line.reviewer) for line in lines) == sorted(work)


def test_one_question_at_a_time_and_few_that_wait(
    own_reviews: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, running, most = threading.Event(), [], []

    def slow(bench: Workbench, _prompt: str) -> Reading:
        running.append(1)
        most.append(len(running))
        assert go.wait(120)
        running.pop()
        return Reading(bench.reader, (1, 2))

    monkeypatch.setattr(Workbench, "read", slow)
    with (
        client_of(own_reviews, max_waiting=2) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        asked = [pool.submit(client.post, "/api/trace", json={"prompt": "x"}) for _ in range(8)]
        turned_away = [one.result() for one in itertools.islice(as_completed(asked), 5)]
        # What needs no model is answered meanwhile.
        assert client.get("/api/queue").status_code == 200
        go.set()
        answers = [one.result() for one in asked]
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 3 + [503] * 5, [answer.text[:500] for answer in answers]
    assert max(most) == 1
    for answer in turned_away:
        assert "busy" in answer.json()["error"]["what"]
        assert answer.headers["retry-after"] == "1"


def test_a_mistake_of_ours_shows_no_insides(
    own_reviews: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(Workbench, "read", broken)
    answer = client_of(own_reviews).post("/api/trace", json={"prompt": PROMPT})
    assert answer.status_code == 500
    assert "/secret/path" not in answer.text
    assert "Traceback" not in answer.text
    assert "ZeroDivisionError" in answer.json()["error"]["why"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]


class Tags(HTMLParser):
    """Scripts and handlers of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sources: list[str | None] = []
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.sources.append(dict(attrs).get("src"))


def test_the_page_has_no_inline_script_and_hostile_text_stays_text(hostile: Served) -> None:
    client = client_of(hostile)
    html = client.get("/").text
    page = Tags(html)
    assert len(page.sources) >= 5
    risky = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?:")
    for source in page.sources:
        assert source is not None
        code = client.get(source)
        assert code.headers["content-type"].startswith("text/javascript")
        assert not risky.search(code.text)
    assert "img" not in page.names
    assert "style" not in page.attributes
    assert not {name for name in page.attributes if name.startswith("on")}
    assert "&lt;img src=x" in html
    assert "\u202e" not in html


def test_hostile_labels_and_prompts_come_back_visible_and_short(hostile: Served) -> None:
    client = client_of(hostile)
    prompt = HOSTILE + " \u202e x"
    answers = [
        client.post("/api/trace", json={"prompt": prompt}),
        client.post("/api/position", json={"prompt": prompt, "position": 2}),
        client.post("/api/explain", json={"prompt": prompt, "position": 2}),
        client.get("/api/features", params={"count": 48}),
        client.get("/api/queue"),
    ]
    for answer in answers:
        assert answer.status_code == 200
        text = answer.json()
        strings = list(_strings(text))
        assert any("⟨U+202E⟩" in string for string in strings) or "tokens" in text
        for string in strings:
            assert not set(string) & set("\u202e\u200b\x1b")
            assert LONG[:500] not in string


def test_a_label_below_the_bar_is_marked_wherever_it_is_sent(served: Served) -> None:
    reader = served.workbench.reader
    texts = {
        latent: LabelText(
            f"sure {latent}" if latent % 2 else f"guess {latent}", 0.5, latent % 2 > 0
        )
        for latent in range(reader.sae.num_latents)
    }
    bench = Workbench(replace(reader, labels=texts), max_tokens=64)
    client = client_of(served._replace(workbench=bench))
    last = len(bench.read(PROMPT).ids) - 1
    found = ask(client, "/api/position", prompt=PROMPT, position=last)
    traced = ask(client, "/api/trace", prompt=PROMPT)["tokens"][last]
    seen = set()
    for feature in found["features"] + traced["features"]:
        sure, text = feature["latent"] % 2 > 0, texts[feature["latent"]].text
        seen.add(sure)
        assert feature["label"] == (text if sure else None)
        assert feature["unsure_label"] == (None if sure else text)
        assert (feature["quoted"], feature["confidence"]) == (sure, 0.5)
    assert seen == {True, False}
    said = ask(client, "/api/explain", prompt=PROMPT, position=last)
    assert "guess" not in json.dumps(said)
    assert any(
        what.startswith(("not labelled; ", "no sure label; ")) for *_, what in said["active"]
    )
    for card in client.get("/api/features", params={"count": 48}).json()["cards"]:
        (feature,) = [f for f in served.catalogue.labels.features if f.latent == card["latent"]]
        assert card["high"] == feature.high_confidence


def _strings(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
