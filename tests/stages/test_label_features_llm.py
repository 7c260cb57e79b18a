"""The stage with a language model among its labelers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rldecoder.artifacts.catalogue import Labels
from rldecoder.config.interp import LabelFeaturesConfig, PredicateSettings, RankFeaturesConfig
from rldecoder.dashboard.label_table import NONE, OTHERS_WORDS, imported_rows
from rldecoder.errors import BadInputError, BudgetExceededError
from rldecoder.reporting import SilentReporter
from rldecoder.stages.context import StageContext
from rldecoder.stages.label_features import estimate
from rldecoder.stages.table import stage_named
from tests.interp.llm.fake_server import KEY, Answer, data_of, label, said, serve
from tests.stages.interp_inputs import Folders, inputs_of, make_inputs, run_stage
from tests.stages.published import published
from tests.stages.test_imported_labels import explanations

STAGE = stage_named("label_features")
RANK = RankFeaturesConfig(
    domains=("label",), budget_tokens=256, validation_tokens=48, validation_top=3,
    validation_others=3,
)  # fmt: skip
PLAIN: dict[str, Any] = {
    "num_features": 10,
    "control_features": 5,
    "control_tokens": 600,
    "predicate": PredicateSettings(min_score=0.35),
}
SMALL = {"judge_windows": 2, "planted_features": 4, "min_planted": 3, "control_features": 3}


def with_llm(folder: Path, labeler: dict[str, Any], **changes: Any) -> LabelFeaturesConfig:
    llm = {"labeler": labeler, "cache": folder / "answers.sqlite", **SMALL, **changes}
    return LabelFeaturesConfig.model_validate(
        PLAIN | {"labelers": ["predicate", "llm"], "llm": llm}
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> Folders:
    folder = tmp_path_factory.mktemp("label_llm")
    made = make_inputs(folder, tiny_lm_dir)
    run_stage(stage_named("rank_features"), made, RANK, folder / "rank")
    return made


def behave(body: dict[str, Any], number: int) -> Answer:
    """Labels everything, and says yes to every second window."""
    lines = data_of(body)
    if "token" in lines[-1]:
        return said(f'{{"answers": {[i % 11 for i in range(len(lines) - 1)]}}}')
    if "piece" in lines[-1] and '{"answer": number}' in body["messages"][-1]["content"]:
        return said('{"answer": 2}')
    if "piece" not in lines[-1]:
        return label(f"label <b>{number}</b>")
    values = ", ".join("true" if i % 2 else "false" for i in range(len(lines) - 1))
    return said(f'{{"answers": [{values}]}}')


def test_both_labels_are_published_with_their_scores_and_the_ledger(
    tmp_path: Path, inputs: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_API_KEY", KEY)
    plain = LabelFeaturesConfig.model_validate(PLAIN)
    _, before = run_stage(STAGE, dict(inputs), plain, tmp_path / "plain")
    assert published(Labels, before).ledger is None
    with serve(behave) as server:
        endpoint = {
            "kind": "endpoint", "base_url": server.url, "model": "fake",
            "api_key_env": "TEST_API_KEY", "price_input": 1.0,
        }  # fmt: skip
        config = with_llm(tmp_path, endpoint)
        scratch = tmp_path / "scratch"
        ctx = StageContext(scratch, scratch, 0, torch.device("cpu"), SilentReporter())
        still, spent = estimate(inputs_of(STAGE, inputs), config, ctx)
        assert not server.bodies
        output, out = run_stage(STAGE, dict(inputs), config, tmp_path / "llm")
        sent = len(server.bodies)
        assert (still.requests, still.cached, spent.requests) == (sent, 0, 0)
        still, _ = estimate(inputs_of(STAGE, inputs), config, ctx)
        assert (still.requests, still.cached) == (0, sent)
        run_stage(STAGE, dict(inputs), config, tmp_path / "again")
        assert len(server.bodies) == sent
        poor = with_llm(tmp_path, endpoint | {"seed": 3}, budget={"max_requests": 5})
        with pytest.raises(BudgetExceededError, match="Nothing was sent now"):
            run_stage(STAGE, dict(inputs), poor, tmp_path / "poor")
        assert len(server.bodies) == sent
    artifact = published(Labels, out)
    old, new = published(Labels, before).labels, artifact.labels
    assert (new.schema_version, new.schema_minor) == (4, 1)
    # The deterministic labeler's part is what it was without the language model.
    for ours, theirs in zip(new.features, old.features, strict=True):
        assert ours.model_copy(update={"other_labels": []}) == theirs
        [other] = ours.other_labels
        assert (other.label is None) == (other.failure is not None)
        assert not other.judge_trusted
        assert "fake at 127.0.0.1" in (other.model, other.judge)
    assert any(f.other_labels[0].label for f in new.features)
    assert new.judge is not None
    assert not new.judge.trusted
    assert artifact.controls.llm.judge == new.judge
    assert artifact.controls.llm.attempts == sent
    assert "must not be believed" in output.reasons[-1]
    assert output.metrics["llm_judge_trusted"] is False
    ledger = artifact.ledger.to_pylist()
    assert len(ledger) == sent
    assert sum(row["cost"] for row in ledger) == pytest.approx(sent * 100 / 1e6)
    for path in (*out.rglob("*"), *(tmp_path / "llm" / "progress").rglob("*")):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_more_scores_and_a_random_sae_where_they_are_asked_for(
    tmp_path: Path, inputs: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_API_KEY", KEY)
    asks = {"intruder_questions": 2, "simulation_windows": 1, "control_latents": 3}
    with serve(behave) as server:
        endpoint = {"kind": "endpoint", "base_url": server.url, "model": "fake"}
        config = with_llm(tmp_path, endpoint, **asks)
        scratch = tmp_path / "scratch"
        ctx = StageContext(scratch, scratch, 0, torch.device("cpu"), SilentReporter())
        still, _ = estimate(inputs_of(STAGE, inputs), config, ctx)
        output, out = run_stage(STAGE, dict(inputs), config, tmp_path / "llm")
        assert len(server.bodies) == still.requests
        assert estimate(inputs_of(STAGE, inputs), config, ctx)[0].requests == 0
    artifact = published(Labels, out)
    scores = [f.other_labels[0].scores for f in artifact.labels.features]
    assert any(s.intruder is not None for s in scores)
    assert any(s.simulation for s in scores)
    llm = artifact.controls.llm
    assert {name: found.latents for name, found in llm.controls.items()} == {
        "random_sae": 3, "drawn": 3,
    }  # fmt: skip
    gap = llm.gaps.drawn_random_sae["detection"]
    assert gap.low <= gap.difference <= gap.high
    assert output.metrics["llm_gap_detection"] == gap.difference
    assert output.metrics["llm_mean_intruder"] == llm.means["intruder"]
    # They are latents of the deterministic labels' own controls.
    rows, ledger = artifact.scores.to_pylist(), artifact.ledger.to_pylist()
    for method in ("random_sae", "drawn"):
        named = {row["latent"] for row in ledger if row["purpose"] == f"{method}_label"}
        assert len(named) == 3
        assert named <= {row["latent"] for row in rows if row["method"] == method}


def test_labels_of_others_in_words_are_judged_with_their_controls(
    tmp_path: Path, inputs: Folders
) -> None:
    path = explanations(tmp_path)
    path.write_text(path.read_text().replace(r"say \"the\"", "odd things"))
    with serve(behave) as server:
        endpoint = {"kind": "endpoint", "base_url": server.url, "model": "fake"}
        config = with_llm(tmp_path, endpoint, confidence=False).model_copy(
            update={"imported": path}
        )
        scratch = tmp_path / "scratch"
        ctx = StageContext(scratch, scratch, 0, torch.device("cpu"), SilentReporter())
        still, _ = estimate(inputs_of(STAGE, inputs), config, ctx)
        output, out = run_stage(STAGE, dict(inputs), config, tmp_path / "llm")
        assert len(server.bodies) == still.requests
        assert any("something about prepositions" in str(body) for body in server.bodies)
    artifact = published(Labels, out)
    found = artifact.imported
    assert found is not None
    table = [row for row in artifact.imported_rows.to_pylist() if row["reading"] == "words"]
    assert table
    assert {row["text"] for row in table} <= {"something about prepositions", "odd things"}
    # It says yes to every second window, and is not believed: nothing it says is a pass.
    assert found.judge == artifact.labels.judge
    assert not found.judge.trusted
    assert {(row["judge_trusted"], row["accepted"]) for row in table} == {(False, None)}
    scored = [row for row in table if row["judged_detection"] is not None]
    assert found.words["imported"].latents == len(scored) > 0
    assert found.words["ours"].latents == len(scored)
    assert "not judged: in free words" not in found.unscored
    purposes = {row["purpose"] for row in artifact.ledger.to_pylist()}
    assert {"imported_detection", "imported_shuffled_detection",
            "imported_random_sae_detection"} <= purposes  # fmt: skip
    shown = [row for row in imported_rows(found) if "(not trusted)" in row[0]]
    assert [row[0] for row in shown] == [f"{name} (not trusted)" for name in OTHERS_WORDS.values()]
    assert {row[3] for row in shown} == {NONE}
    mean = found.words["imported"].means["detection"]
    assert output.metrics["imported_imported_judged_detection"] == mean


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    local = {"kind": "local"}
    with pytest.raises(ValidationError, match="control_latents"):
        with_llm(tmp_path, local, control_latents=6)
    with pytest.raises(ValidationError, match="judge_tokens of at least 80"):
        with_llm(tmp_path, local, simulation_windows=1, judge_tokens=79)
    with_llm(tmp_path, local, simulation_windows=1, judge_tokens=80)


def test_a_tiny_random_model_fails_and_is_not_believed(tmp_path: Path, inputs: Folders) -> None:
    frozen = {"kind": "local", "model": "frozen"}
    sizes = {"label_tokens": 8, "judge_tokens": 8, "num_top": 1, "num_quantile": 0,
             "num_negative": 0}  # fmt: skip
    config = with_llm(tmp_path, frozen, **sizes)
    output, out = run_stage(STAGE, dict(inputs), config, tmp_path / "local")
    labels = published(Labels, out).labels
    others = [feature.other_labels[0] for feature in labels.features]
    assert all(other.label is None and other.failure for other in others)
    assert all(other.scores.detection == other.scores.fuzzing == 0.0 for other in others)
    assert labels.judge is not None
    assert not labels.judge.trusted
    assert labels.judge.failures == labels.judge.questions > 0
    assert output.metrics["llm_labelled"] == 0
    assert labels.labelled > 0  # the predicate's own labels are untouched


def test_prompts_and_local_models_are_fingerprinted(tmp_path: Path, tiny_lm_dir: Path) -> None:
    endpoint = {"kind": "endpoint", "base_url": "https://h.org/v1", "model": "m"}
    found = STAGE.fingerprint(with_llm(tmp_path, endpoint))
    assert set(found) == {"prompts"}
    local = {"kind": "local", "model": "folder", "path": str(tiny_lm_dir)}
    with_judge = STAGE.fingerprint(with_llm(tmp_path, endpoint, judge=local))
    assert set(with_judge) == {"prompts", "judge"}
    assert STAGE.fingerprint(LabelFeaturesConfig()) == {}
    with pytest.raises(BadInputError):
        STAGE.fingerprint(with_llm(tmp_path, local | {"path": str(tmp_path)}))


def test_money_and_places_are_not_part_of_the_digest(tmp_path: Path) -> None:
    endpoint = {"kind": "endpoint", "base_url": "https://h.org/v1", "model": "m"}
    free = {"api_key_env": "A", "price_input": 1.0, "timeout_seconds": 2.0, "concurrency": 9}
    base = with_llm(tmp_path, endpoint).digest_fields()
    same = with_llm(tmp_path / "x", endpoint | free, budget={"max_cost": 1.0}).digest_fields()
    assert base == same
    assert with_llm(tmp_path, endpoint | {"model": "n"}).digest_fields() != base
    assert with_llm(tmp_path, endpoint, temperature=1.0).digest_fields() != base


@pytest.mark.parametrize(
    "changes",
    [
        {"labelers": []},
        {"labelers": ["llm"], "llm": {}},
        {"labelers": ["predicate", "predicate"]},
        {"labelers": ["predicate", "llm"]},
        {"llm": {}},
    ],
    ids=str,
)
def test_labelers_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="label"):
        LabelFeaturesConfig.model_validate(changes)
