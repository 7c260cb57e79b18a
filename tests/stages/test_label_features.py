from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rldecoder.artifacts.catalogue import Labels
from rldecoder.config.interp import LabelFeaturesConfig, PredicateSettings, RankFeaturesConfig
from rldecoder.data.shards import read_tokens
from rldecoder.errors import BadInputError
from rldecoder.interp.review import ReviewLine, append_review
from rldecoder.interp.shown import ShownLatents
from rldecoder.stages.table import stage_named
from tests.stages.interp_inputs import (
    Folders,
    make_inputs,
    run_stage,
    write_tokens,
)
from tests.stages.published import files_of, published

STAGE = stage_named("label_features")

RANK = RankFeaturesConfig(
    domains=("label",), budget_tokens=256, validation_tokens=48, validation_top=3,
    validation_others=3,
)  # fmt: skip
CONFIG = LabelFeaturesConfig(
    num_features=24,
    control_features=10,
    control_tokens=600,
    predicate=PredicateSettings(min_score=0.35),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> Folders:
    folder = tmp_path_factory.mktemp("label")
    made = make_inputs(folder, tiny_lm_dir)
    run_stage(stage_named("rank_features"), made, RANK, folder / "rank")
    return made


def test_labels_scores_and_controls(tmp_path: Path, inputs: Folders) -> None:
    output, out = run_stage(STAGE, inputs, CONFIG, tmp_path / "label")
    artifact = published(Labels, out, output)
    labels = artifact.labels
    assert labels.requested == 24
    assert labels.labelled + labels.failed == len(labels.features) == 24
    assert sum(labels.count(kind) for kind in ("input", "output", "both", "none")) == 24
    assert labels.sae_digest == "train_sae"
    importance = [feature.importance for feature in labels.features]
    assert importance == sorted(importance, reverse=True)
    audit = [f for f in labels.features if f.audit]
    assert len(audit) == max(1, round(0.1 * labels.labelled))
    assert all(f.status == "labelled" for f in audit)
    confident = sum(feature.high_confidence for feature in labels.features)
    assert labels.coverage == confident / 24
    for feature in labels.features:
        assert feature.confidence_low <= feature.confidence <= feature.confidence_high
        assert len(feature.promoted) == len(feature.suppressed) == 10
        assert feature.promoted[0].effect > feature.suppressed[0].effect
        if feature.status == "failed":
            assert feature.failure
            assert feature.confidence == feature.scores.f1 == feature.scores.detection == 0
        else:
            assert feature.examples
            assert feature.scores.f1 is not None
        kinds = [example.kind for example in feature.contrasts]
        assert kinds == sorted(kinds, key=("quantile", "near_miss").index)
        assert all(kinds.count(kind) <= 2 for kind in kinds)
        assert all((e.act == 0) == (e.kind == "near_miss") for e in feature.contrasts)
    assert {e.kind for f in labels.features for e in f.contrasts} == {"quantile", "near_miss"}

    scores = artifact.scores.to_pylist()
    by_method = {m: [r for r in scores if r["method"] == m] for m in ("label", "shuffled")}
    assert [r["latent"] for r in by_method["label"]] == [f.latent for f in labels.features]
    with_input = sum(f.input.text is not None for f in labels.features)
    assert 0 < with_input < 24
    assert len(by_method["shuffled"]) == with_input
    controls = artifact.controls
    methods = controls.methods
    assert methods["random_sae"].latents == 10
    assert methods["drawn"].latents == 10
    gap = controls.gaps.drawn_random_sae["detection"]
    assert gap.low <= gap.difference <= gap.high
    drawn, random = (methods[name].means["detection"] for name in ("drawn", "random_sae"))
    assert output.metrics["gap_detection"] == gap.difference == pytest.approx(drawn - random)
    assert output.metrics["drawn_detection"] == drawn
    label, calibration = methods["label"], controls.calibration
    assert calibration.people is None  # nobody has said anything
    assert label.failed == 24 - with_input
    assert label.means["f1"] < label.means_labelled["f1"]
    assert methods["shuffled"].means["f1"] < label.means_labelled["f1"]
    assert calibration.test.n <= labels.labelled
    assert calibration.high_confidence.labels == confident
    assert calibration.best_possible_coverage <= label.accepted / 24
    found = controls.coverage.methods["label"]
    assert found.latents == 24
    assert [found.input, found.output, found.both, found.none] == [
        labels.count(kind) for kind in ("input", "output", "both", "none")
    ]
    assert label.accepted == 24 - found.none
    assert controls.coverage.methods.keys() == methods.keys()
    assert (
        output.metrics["coverage_random_sae"]
        == controls.coverage.methods["random_sae"].coverage.value
    )
    rows = artifact.output_scores.to_pylist()
    assert {r["method"] for r in rows} == methods.keys()
    own = [r for r in rows if r["method"] == "label"]
    assert [r["latent"] for r in own] == [f.latent for f in labels.features]
    assert [r["accepted"] for r in own] == [f.output.accepted for f in labels.features]
    # Of every latent something can be said, of those that are not to be labelled too.
    said = ShownLatents(labels, artifact.descriptions)
    fired = {row["latent"] for row in artifact.descriptions.to_pylist()}
    assert fired >= {f.latent for f in labels.features}
    assert len(fired) > 24
    for latent in fired:
        words = said.of(latent)
        assert words.is_label or words.text.startswith("not labelled; fires most strongly on ")
    point = calibration.at_point_estimate.coverage
    assert point.low <= point.value <= point.high
    for name in ("detection_hard", "fuzzing_hard", "intruder", "simulation"):
        assert all(method.means_labelled[name] is not None for method in methods.values())
        assert any(getattr(feature.scores, name) for feature in labels.features)
    assert output.metrics["failed"] == labels.failed
    examples = artifact.examples.to_pylist()
    kinds = {row["kind"] for row in examples}
    assert kinds == {"top", "quantile", "negative", "near_miss"}
    silent = [row for row in examples if row["kind"] in ("negative", "near_miss")]
    assert all(sum(row["acts"]) == 0 for row in silent)

    _, again = run_stage(STAGE, inputs, CONFIG, tmp_path / "label-again")
    assert files_of(again) == files_of(out)


def test_examples_come_from_all_text_and_labels_from_a_sample(
    tmp_path: Path, inputs: Folders
) -> None:
    _, out = run_stage(STAGE, inputs, CONFIG, tmp_path / "all")
    small = CONFIG.model_copy(update={"fit_tokens": 800, "example_tokens": 100_000})
    _, sampled = run_stage(STAGE, inputs, small, tmp_path / "sampled")
    paths = [Labels.examples.path(folder) for folder in (out, sampled)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    every, some = (published(Labels, folder).labels.features for folder in (out, sampled))
    assert [f.density for f in every] == [f.density for f in some]
    assert [f.input.predicate for f in every] != [f.input.predicate for f in some]
    assert any(f.input.predicate for f in some)
    failures = [f.input.failure for f in some if f.input.failure]
    firings = [int(failure.split()[2]) for failure in failures if "fires on" in failure]
    assert all(count < CONFIG.predicate.min_firings for count in firings)
    with pytest.raises(ValueError, match="example_tokens"):
        LabelFeaturesConfig(fit_tokens=2, example_tokens=1)


def test_a_review_file_overrides_labels_and_is_fingerprinted(
    tmp_path: Path, inputs: Folders
) -> None:
    _, out = run_stage(STAGE, inputs, CONFIG, tmp_path / "plain")
    first = published(Labels, out).labels.features[0]
    path = tmp_path / "reviews.jsonl"
    line = {"sae_digest": "train_sae", "latent": first.latent, "reviewer": "ann", "label": "mine"}
    path.write_text(json.dumps(line) + "\n")
    config = CONFIG.model_copy(update={"reviews": path})
    _, out = run_stage(STAGE, inputs, config, tmp_path / "reviewed")
    changed = published(Labels, out).labels.features[0]
    assert changed.latent == first.latent
    assert changed.label == "mine"
    assert changed.high_confidence
    assert changed.audit == first.audit
    assert changed.previous_labels

    before = STAGE.fingerprint(config)
    path.write_text(path.read_text() * 2)
    assert STAGE.fingerprint(config) != before
    assert STAGE.fingerprint(CONFIG) == {}
    assert "reviews" not in config.digest_fields()
    path.unlink()
    with pytest.raises(BadInputError, match="does not exist"):
        STAGE.fingerprint(config)


def test_verdicts_of_the_audit_refit_confidence_and_threshold(
    tmp_path: Path, inputs: Folders
) -> None:
    config = CONFIG.model_copy(update={"num_features": 96, "review_audit_share": 1.0})
    _, out = run_stage(STAGE, inputs, config, tmp_path / "before")
    before = published(Labels, out).labels
    audit = [f for f in before.features if f.audit]
    assert len(audit) >= 30
    path = tmp_path / "reviews.jsonl"
    reviewed, waiting = audit[:-5], audit[-5:]
    for n, feature in enumerate(reviewed):
        said = {"accept": True} if n % 2 else {"accept": False, "label": "better"}
        append_review(path, ReviewLine(
            sae_digest="train_sae", latent=feature.latent, reviewer="ann", audit=True,
            shown=feature.label, **said,
        ))  # fmt: skip
    output, out = run_stage(
        STAGE, inputs, config.model_copy(update={"reviews": path}), tmp_path / "after"
    )
    artifact = published(Labels, out)
    after = artifact.labels
    of = {f.latent: f for f in after.features}
    people = artifact.controls.calibration.people
    assert people.n == output.metrics["people_n"] == len(reviewed)
    assert 0 <= people.ece <= 1
    assert output.metrics["people_brier"] == people.brier
    # People accept every second label, whatever the labeler thinks: no threshold is safe.
    assert after.high_confidence_threshold is None is people.high_confidence_threshold
    assert not any(of[f.latent].high_confidence for f in waiting)
    assert any(of[f.latent].confidence != f.confidence for f in waiting)
    for n, feature in enumerate(reviewed):
        found = of[feature.latent]
        assert found.high_confidence  # accepted, or a person's own words
        assert found.reviews[0].at is not None
        if n % 2 == 0:
            assert found.confidence == pytest.approx(2 / 3)
    assert after.coverage == len(reviewed) / len(after.features)

    # A labeler that now says something else: the verdicts stay, and decide nothing.
    other = config.model_copy(
        update={
            "reviews": path,
            "predicate": PredicateSettings(max_atoms=1, max_tokens=1),
            "output_share": 0.2,
        }
    )
    _, out = run_stage(STAGE, inputs, other, tmp_path / "other")
    old = {f.latent: f.label for f in before.features}
    found = [
        f for f in published(Labels, out).labels.features
        if f.reviews and not f.by_person and f.label != old[f.latent]
    ]  # fmt: skip
    assert found
    assert all(f.reviews[0].accept for f in found)
    tau = published(Labels, out).labels.high_confidence_threshold
    for f in found:
        assert f.high_confidence == (tau is not None and f.confidence >= tau)


def test_a_leak_between_splits_is_refused(tmp_path: Path, inputs: Folders) -> None:
    folder = tmp_path / "ingest"
    shutil.copytree(inputs["ingest"], folder)
    tokens = read_tokens(folder, "test")
    # The documents of the test split get the ids of those of the label split.
    docs = np.arange(tokens.size).reshape(tokens.shape) // 120
    write_tokens(folder, "test", tokens, docs, 512)
    with pytest.raises(BadInputError, match="share"):
        run_stage(STAGE, inputs | {"ingest": folder}, CONFIG, tmp_path / "leak")


def test_a_domain_that_was_not_ranked_is_a_clear_error(tmp_path: Path, inputs: Folders) -> None:
    config = CONFIG.model_copy(update={"rank_domain": "cloze"})
    with pytest.raises(BadInputError, match="rank_domain"):
        run_stage(STAGE, inputs, config, tmp_path / "nothing")


def test_fewer_latents_than_requested_is_said(tmp_path: Path, inputs: Folders) -> None:
    config = CONFIG.model_copy(update={"num_features": 1000})
    output, _ = run_stage(STAGE, inputs, config, tmp_path / "many")
    assert "of the 1000 requested latents" in output.reasons[0]
