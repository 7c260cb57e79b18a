"""Human review: what is asked, how it is shown, and that answers survive. The server is real."""

from __future__ import annotations

import functools
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import FlowPauseTimeout

from flows.review import MissingLabel, ReviewParameters, Verdict, as_markdown, review
from rldecoder.artifacts.catalogue import Clusters, Labels
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore, Manifest
from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError
from rldecoder.interp.records import Example, FeatureLabel, FeatureLabels, Scores
from rldecoder.interp.review import ReviewLine, append_review, read_reviews
from rldecoder.interp.review_queue import ReviewQueue, make_queue
from rldecoder.runner import plan
from tests.flows.ui_client import PATIENCE_SECONDS, ROOT, Ui


def feature(latent: int, audit: bool = False, **changes: Any) -> FeatureLabel:
    values: dict[str, Any] = {
        "latent": latent,
        "status": "labelled",
        "label": "a <b>number</b>",
        "failure": None,
        "predicate": None,
        "labeler": "predicate-1",
        "confidence": 0.5,
        "confidence_low": 0.4,
        "confidence_high": 0.6,
        "high_confidence": False,
        "importance": 0.02,
        "importance_rank": latent,
        "density": 0.01,
        "scores": Scores(
            detection=0.9, fuzzing=None, precision=0.5, recall=0.5, f1=0.5, auprc=0.3, firings=9
        ),
        "examples": [
            Example(seq_id=0, pos=2, act=1.0, tokens=["a\n", "</script>", "\u202eb"], focus=1)
        ],
        "promoted": [],
        "suppressed": [],
        "audit": audit,
    }
    return FeatureLabel.model_validate(values | changes)


def labels(*features: FeatureLabel) -> FeatureLabels:
    return FeatureLabels(
        model_name="tiny",
        hook_layer=2,
        num_latents=96,
        sae_digest="abc",
        requested=10,
        features=list(features),
        labelled=len(features),
        failed=0,
        high_confidence_threshold=None,
        coverage=0.0,
    )


def test_text_of_the_corpus_stays_inert() -> None:
    shown = as_markdown(feature(1))
    assert "\u202e" not in shown  # an override that would reverse the line is spelt out
    assert r"\u202eb" in shown
    risky = [line for line in shown.splitlines() if "<" in line]
    assert len(risky) == 2
    assert all(line.startswith('    "') for line in risky)  # Markdown code: no markup in it


def test_a_failed_label_shows_why() -> None:
    failed = feature(1, status="failed", label=None, failure="too few firings")
    assert "too few firings" in as_markdown(failed)


def test_without_a_label_there_is_nothing_to_accept() -> None:
    assert set(Verdict.model_fields) == {"verdict", "better_label", "note"}
    assert set(MissingLabel.model_fields) == {"better_label", "note"}
    with pytest.raises(ValueError, match="extra"):
        MissingLabel.model_validate({"verdict": "accept"})


def test_an_untouched_form_is_no_verdict() -> None:
    # A switch that starts off was sent as a rejection by whoever only pressed the button.
    # Now there is none to start with, and a form without one is refused.
    choice = Verdict.model_json_schema()["properties"]["verdict"]
    assert choice["enum"] == ["accept", "reject", "skip"]
    assert "default" not in choice
    with pytest.raises(ValueError, match="verdict"):
        Verdict.model_validate({"note": "n"})
    assert Verdict.model_validate({"verdict": "undecided"}).verdict == "skip"
    # A form of before, answered after an upgrade.
    assert Verdict.model_validate({"accept": True, "note": "n"}).verdict == "accept"
    assert Verdict.model_validate({"accept": False}).verdict == "reject"


def test_the_form_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="count"):
        ReviewParameters(count=0)


@pytest.fixture
def published(tmp_path: Path) -> ArtifactStore:
    """A store that holds labels and queue of the debug run, and nothing else."""
    store = ArtifactStore(tmp_path)
    ours = labels(
        feature(6, confidence=0.9), feature(7, audit=True), feature(8), feature(9, confidence=0.6)
    )
    publish(store, "label_features", ours)
    # 9 is more uncertain than 6, but of the same cluster as 8.
    publish(store, "cluster_features", make_queue(ours, {8: 8, 9: 8}, 0))
    return store


def publish(
    store: ArtifactStore,
    stage: str,
    content: FeatureLabels | ReviewQueue,
    overrides: list[str] | None = None,
) -> ArtifactRef:
    ref = plan(load_run_config(ROOT / "configs" / "debug.yaml", overrides))[stage]
    manifest = Manifest(
        kind=ref.kind, stage=ref.stage, digest=ref.digest, version=1, config={}, seed=0,
        inputs={}, fingerprint={}, files={}, metrics={}, source_digest="", git_commit=None,
        packages={}, device="cpu", device_name="cpu", threads=1, wall_seconds=0.0,
        peak_memory_bytes=0, resumed=False, created_at="",
    )  # fmt: skip
    with store.building(ref) as out:
        file = Labels.labels if isinstance(content, FeatureLabels) else Clusters.queue
        content.save(file.path(out))
        store.publish(ref, out, manifest)
    return ref


def start(ui: Ui, parameters: ReviewParameters, pool: ThreadPoolExecutor) -> Future[int]:
    """The flow, in a thread of this process, against the test's server."""

    def work() -> int:
        with ui.prefect_settings():
            return review(parameters)

    return pool.submit(work)


def latest_pause(ui: Ui, done: set[str]) -> Any:
    """The flow run's record, once it is paused in a state that is not among `done`."""
    runs = ui.flow_runs(flows={"name": {"any_": ["review"]}}, sort="START_TIME_DESC", limit=1)
    state = runs[0]["state"] if runs else {"type": ""}
    return runs[0] if state["type"] == "PAUSED" and state["id"] not in done else None


def latest_asked(ui: Ui) -> int:
    """The one latent that the latest review asked about."""
    (run,) = ui.flow_runs(flows={"name": {"any_": ["review"]}}, sort="START_TIME_DESC", limit=1)
    (key,) = run["empirical_policy"]["pause_keys"]
    return int(key.split("-")[1])


def is_taken(ui: Ui, path: str, answer: dict[str, Any]) -> bool:
    """Whether the server takes an answer; Prefect keeps the form a moment after the pause."""
    return bool(ui.post(path, {"run_input": answer}).json()["status"] == "ACCEPT")


@pytest.mark.slow
def test_the_flow_asks_waits_and_keeps_the_answers(ui: Ui, published: ArtifactStore) -> None:
    parameters = ReviewParameters(config="debug", store=str(published.root))
    better = {"verdict": "reject", "better_label": "digits", "note": "n"}
    # Nobody is named at the start: the first form asks who answers, and no later one does.
    first = {"verdict": "accept", "reviewer": " ann "}
    answers = [first, {"verdict": "reject"}, better, {"verdict": "skip"}]
    with ThreadPoolExecutor(1) as pool:
        flow = start(ui, parameters, pool)
        seen: set[str] = set()
        for answer in answers:
            run = ui.until(lambda: flow.exception() if flow.done() else latest_pause(ui, seen))
            assert not isinstance(run, BaseException), run
            seen.add(run["state"]["id"])
            path = f"/flow_runs/{run['id']}/resume"
            # The form is checked by the server.
            for wrong in ({"verdict": "perhaps"}, {}):
                assert ui.post(path, {"run_input": wrong}).json()["status"] == "REJECT"
            ui.until(functools.partial(is_taken, ui, path, answer))
        assert flow.result(60) == 4
    lines = read_reviews(published.root / "reviews.jsonl", "abc")
    assert [(line.latent, line.accept, line.label, line.audit) for line in lines] == [
        (8, True, None, False), (6, False, None, False), (7, False, "digits", True),
    ]  # fmt: skip
    assert {(line.reviewer, line.shown) for line in lines} == {("ann", "a <b>number</b>")}
    shown = ui.get("/artifacts/review/latest")["data"]
    assert json.dumps("a <b>number</b>") in shown
    assert "press **Resume**" in shown
    assert "The label says what the text is where it fires:" in shown
    # Nothing is asked twice but the last one, whose form was sent as it came: it says nothing.
    again = parameters.model_copy(update={"timeout_seconds": 1, "reviewer": "ann"})
    with ThreadPoolExecutor(1) as pool, pytest.raises(FlowPauseTimeout):
        start(ui, again, pool).result(300)
    assert latest_asked(ui) == 9


@pytest.mark.slow
@pytest.mark.timeout(1800)  # each answer starts two processes, which a busy machine makes long
def test_a_suspended_review_goes_on_where_it_was(ui: Ui, tmp_path: Path) -> None:
    """No process waits; each answer starts the flow anew, and yet each label is asked once."""
    reviews = tmp_path / "said.jsonl"
    # The same person has judged an older label of a latent: that answers nothing of this one.
    older = ReviewLine(
        sae_digest="abc", latent=9, reviewer="ann", accept=False, shown="an older label"
    )
    append_review(reviews, older)
    # The file is a part of the config: each verdict changes what the config asks for.
    overrides = [f"label_features.reviews={reviews}"]
    store = ArtifactStore(tmp_path / "store")
    missing = feature(5, status="failed", label=None, failure="rare", confidence=0.0,
                      confidence_low=0.0, confidence_high=0.0)  # fmt: skip
    ours = labels(feature(8), feature(9, importance=0.01), missing)
    publish(store, "label_features", ours, overrides)
    publish(store, "cluster_features", make_queue(ours, {}, 0), overrides)
    # As the form comes: nobody is named, and nothing waits in a process.
    parameters = {"config": "debug", "store": str(store.root), "count": 3, "overrides": overrides}
    run = ui.trigger("review/review", parameters).raise_for_status().json()["id"]
    named = {"verdict": "accept", "reviewer": "ann"}
    accepted, worded = {"verdict": "accept"}, {"better_label": "digits"}
    seen: set[str] = set()
    wrong_words = {"better_label": 7}
    nobody = {"verdict": "accept", "reviewer": "  "}
    switch = {"accept": True}
    for wrong, answer in ((nobody, named), (switch, accepted), (wrong_words, worded)):

        def asks() -> Any:
            state = ui.get(f"/flow_runs/{run}")["state"]
            assert state["type"] not in ("FAILED", "CRASHED", "COMPLETED"), state
            return state if state["type"] == "PAUSED" and state["id"] not in seen else None

        state = ui.until(asks)
        seen.add(state["id"])
        assert state["name"] == "Suspended"
        path = f"/flow_runs/{run}/resume"
        assert ui.post(path, {"run_input": wrong}).json()["status"] == "REJECT"
        ui.until(functools.partial(is_taken, ui, path, answer))
    assert ui.finished(run)["type"] == "COMPLETED"
    lines = read_reviews(reviews, "abc")
    assert [(line.latent, line.accept, line.label) for line in lines] == [
        (9, False, None), (8, True, None), (9, True, None), (5, None, "digits"),
    ]  # fmt: skip
    assert {line.reviewer for line in lines} == {"ann"}
    assert ui.get(f"/flow_runs/{run}")["name"].startswith("debug-")


@pytest.mark.slow
def test_the_flow_can_rebuild_the_labels_with_the_verdicts(
    ui: Ui, debug_store: Path, tmp_path: Path
) -> None:
    store = ArtifactStore(Path(shutil.copytree(debug_store, tmp_path / "store")))
    parameters = ReviewParameters(
        config="debug", store=str(store.root), reviewer="ann", count=1, rebuild=True
    )
    with ThreadPoolExecutor(1) as pool:
        flow = start(ui, parameters, pool)
        run = ui.until(lambda: flow.exception() if flow.done() else latest_pause(ui, set()))
        assert not isinstance(run, BaseException), run
        answer = {"verdict": "reject", "better_label": "mine"}
        ui.post(f"/flow_runs/{run['id']}/resume", {"run_input": answer}).raise_for_status()
        assert flow.result(PATIENCE_SECONDS) == 1
    config = ROOT / "configs" / "debug.yaml"
    refs = plan(load_run_config(config, [f"label_features.reviews={store.root}/reviews.jsonl"]))
    found = FeatureLabels.load(Labels.labels.path(store.path(refs["label_features"])))
    ((reviewed, verdict),) = [(f, r) for f in found.features for r in f.reviews]
    assert (reviewed.label, reviewed.high_confidence) == ("mine", True)
    assert (verdict.reviewer, verdict.accept) == ("ann", False)
    assert verdict.at is not None
    assert verdict.shown == reviewed.previous_labels[0]
    queue = ReviewQueue.load_for(found, Clusters.queue.path(store.path(refs["cluster_features"])))
    assert queue.entries[-1].latent == reviewed.latent  # it has had its turn


@pytest.mark.slow
def test_a_run_without_labels_is_bad_input(ui: Ui, tmp_path: Path) -> None:
    with (
        ui.prefect_settings(),
        pytest.raises(BadInputError, match="has no labels to review yet"),
    ):
        review(ReviewParameters(config="debug", store=str(tmp_path)))
