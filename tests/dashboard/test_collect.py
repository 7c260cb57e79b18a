"""Gathering: texts are made visible, activations line up with tokens, nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rldecoder.artifacts.catalogue import Baselines, Clusters, Corpus, Labels, TrainedSae
from rldecoder.dashboard import collect
from rldecoder.dashboard.cards import feature_cards
from rldecoder.interp.cluster_record import ClusterRecord
from rldecoder.interp.records import (
    Example,
    FeatureLabel,
    FeatureLabels,
    JudgedScores,
    LabelConfidence,
    OtherLabel,
    Review,
    Scores,
    TokenEffect,
)
from rldecoder.interp.review_queue import make_queue
from rldecoder.stages.context import Output
from tests.dashboard.test_relations import cluster_record
from tests.stages.published import published

BIDI = "a\u202eb\u200b</script>"


def label(latent: int, rank: int, text: str | None, examples: list[Example]) -> FeatureLabel:
    nothing = dict.fromkeys(Scores.model_fields, None) | {"firings": 3}
    return FeatureLabel(
        latent=latent, status="labelled" if text else "failed", label=text,
        failure=None if text else "too rare", predicate=None, labeler="test", confidence=0.5,
        confidence_low=0.4, confidence_high=0.6, high_confidence=False, importance=1.0 / rank,
        importance_rank=rank, density=0.1, scores=Scores(**nothing), examples=examples,
        promoted=[TokenEffect(token=BIDI, token_id=1, effect=2.0)], suppressed=[], audit=False,
    )  # fmt: skip


NO_EXAMPLES: Mapping[str, Any] = {name: [] for name in Labels.examples.schema.names}


def saved(
    folder: Path,
    *features: FeatureLabel,
    examples: Mapping[str, Any] = NO_EXAMPLES,
    clusters: ClusterRecord | None = None,
) -> tuple[Labels, Clusters]:
    """Labels with their windows, and their clusters and review queue, in one folder."""
    labels = FeatureLabels(
        model_name="tiny", hook_layer=1, num_latents=9, sae_digest="s", requested=2,
        features=list(features), labelled=1, failed=1, high_confidence_threshold=None, coverage=0.0,
    )  # fmt: skip
    Labels.labels.save(folder, labels)
    Labels.examples.save(folder, examples)
    Clusters.queue.save(folder, make_queue(labels, {}, 0))
    Clusters.clusters.save(folder, clusters or cluster_record([], {}, []))
    return published(Labels, folder), published(Clusters, folder)


@pytest.fixture
def artifacts(tmp_path: Path) -> tuple[Labels, Clusters]:
    shown = Example(seq_id=4, pos=11, act=2.0, tokens=["x", BIDI, "y" * 9000], focus=1)
    other = Example(seq_id=5, pos=1, act=1.0, tokens=["p", "q"], focus=0)
    return saved(
        tmp_path, label(7, 2, None, []), label(3, 1, BIDI, [shown, other]),
        examples={
            "latent": [3, 3], "kind": ["top", "negative"], "rank": [0, 0], "seq_id": [4, 4],
            "pos": [11, 11], "act": [2.0, 0.0], "start": [10, 10],
            "tokens": [[1, 2, 3], [1, 2, 3]], "acts": [[0.0, 2.0, 0.5], [9.0, 9.0, 9.0]],
        },
    )  # fmt: skip


def test_features_are_ordered_visible_and_highlighted(artifacts: tuple[Labels, Clusters]) -> None:
    found = feature_cards(*artifacts, max_features=10, contexts=5)
    assert [feature.latent for feature in found] == [3, 7]
    first = found[0]
    assert first.label == "a⟨U+202E⟩b⟨U+200B⟩</script>"
    assert first.promoted == ("a⟨U+202E⟩b⟨U+200B⟩</script>",)
    window = first.examples[0]
    assert window.heat == (0.0, 1.0, 0.25)
    assert len(window.tokens[2]) < 100
    # Without a window of its own only the focus is coloured.
    assert first.examples[1].heat == (1.0, 0.0)
    assert found[1].failure == "too rare"
    assert [feature.queue for feature in found] == [1, 2]
    (only,) = feature_cards(*artifacts, max_features=1, contexts=1)
    assert len(only.examples) == 1


def test_a_card_holds_contrasts_relations_and_reviews(tmp_path: Path) -> None:
    weak = Example(seq_id=4, pos=7, act=0.5, tokens=["x", BIDI], focus=1, kind="quantile")
    miss = Example(seq_id=6, pos=3, act=0.0, tokens=["p", "q"], focus=0, kind="near_miss")
    top = Example(seq_id=4, pos=11, act=2.0, tokens=["x", "y"], focus=1)
    verdict = {"reviewer": BIDI, "accept": False, "label": BIDI, "audit": True, "note": BIDI,
               "shown": "old", "at": BIDI}  # fmt: skip
    full = label(3, 1, "one", [top, top, top]).model_copy(
        update={"contrasts": [weak, miss], "reviews": [Review.model_validate(verdict)]}
    )
    artifacts = saved(
        tmp_path, full, label(7, 2, None, []), label(8, 3, "eight", []),
        examples={
            "latent": [3], "kind": ["quantile"], "rank": [0], "seq_id": [4], "pos": [7],
            "act": [0.5], "start": [6], "tokens": [[1, 2]], "acts": [[0.25, 0.5]],
        },
        clusters=cluster_record(
            [[8, 3], [7]], {7: ["label_failed", "ultra_dense"]}, [(3, 5)]
        ),
    )  # fmt: skip
    cards = feature_cards(*artifacts, max_features=3, contexts=2)
    first, failed, eight = (card.model_dump(mode="json") for card in cards)
    kinds = [(e["kind"], e["heat"]) for e in first["examples"]]
    assert kinds == [
        ("top", [0.0, 1.0]), ("top", [0.0, 1.0]), ("quantile", [0.5, 1.0]),
        ("near_miss", [0.0, 0.0]),
    ]  # fmt: skip
    assert first["relations"] == {
        "cluster": {"size": 2, "members": [8, 3]}, "alias_of": 8, "absorbed_by": [5],
    }  # fmt: skip
    assert eight["relations"] == {"cluster": {"size": 2, "members": [8, 3]}}
    assert failed["relations"] == {"flags": ["label failed", "ultra dense"]}
    shown = "a⟨U+202E⟩b⟨U+200B⟩</script>"
    assert first["reviews"] == [
        {"reviewer": shown, "accept": False, "label": shown, "note": shown, "at": shown}
    ]
    assert "\u202e" not in json.dumps([first, failed, eight], ensure_ascii=False)
    (bare,) = feature_cards(*artifacts, max_features=1, contexts=0)
    assert bare.examples == ()


def test_a_card_holds_all_scores_and_the_other_labels(tmp_path: Path) -> None:
    values = {name: n / 7 for n, name in enumerate(Scores.model_fields, start=1)} | {"firings": 3}
    judged = {"detection": 2 / 3, "fuzzing": None, "window_precision": 0.5, "questions": 2,
              "failures": 1, "window_recall": 0.25, "window_f1": None, "intruder": -0.25,
              "simulation": None}  # fmt: skip
    names = {"labeler": BIDI, "model": BIDI, "judge": BIDI, "judge_trusted": False}
    both = label(3, 1, "own", []).model_copy(
        update={
            "scores": Scores.model_validate(values),
            "other_labels": [
                OtherLabel(
                    label=BIDI,
                    failure=None,
                    scores=JudgedScores(**judged),
                    no_confidence=None,
                    confidence=LabelConfidence(p=0.55555, low=0.5, high=0.75),
                    **names,
                ),
                OtherLabel(
                    label=None,
                    failure=BIDI,
                    scores=JudgedScores(**judged),
                    no_confidence=BIDI,
                    confidence=None,
                    **names,
                ),
            ],
        }
    )
    (found,) = feature_cards(*saved(tmp_path, both), max_features=1, contexts=1)
    card = found.model_dump(mode="json")
    del values["firings"]
    assert card["scores"] == {name: round(value, 3) for name, value in values.items()}
    shown = "a⟨U+202E⟩b⟨U+200B⟩</script>"
    first, second = card["others"]
    assert {first[name] for name in ("labeler", "model", "judge", "label")} == {shown}
    assert (second["label"], second["failure"], second["trusted"]) == (None, shown, False)
    assert first["scores"] == judged | {"detection": 0.667}
    assert (first["confidence"], first["no_confidence"]) == ([0.556, 0.5, 0.75], None)
    assert (second["confidence"], second["no_confidence"]) == (None, shown)


def test_caveats_once_and_in_order(tmp_path: Path) -> None:
    artifacts = (
        replace(published(Corpus, tmp_path), caveats=("one", "two")),
        replace(published(Baselines, tmp_path), caveats=("two", "three\u202e")),
    )
    assert collect.caveats(artifacts) == ["one", "two", "three⟨U+202E⟩"]


def test_pipeline_shows_every_stage_and_no_times_as_metrics(tmp_path: Path) -> None:
    metrics = {"fvu": 0.25, "tokens_per_second": 9.0, "nothing": None, "n": 12000}
    phases = collect.pipeline([published(TrainedSae, tmp_path, Output(metrics))])
    assert [phase.title for phase in phases] == [
        "Prepare", "Features", "Decoder", "RL", "Interpretation", "Explanations",
    ]  # fmt: skip
    stages = {stage.name: stage for phase in phases for stage in phase.stages}
    assert len(stages) == 19
    assert stages["train_sae"].metrics == [("fvu", "0.25"), ("n", "12,000")]
    assert stages["report"].digest is None


def test_configs_are_flattened(tmp_path: Path) -> None:
    config = {"a": {"b": 1}, "c": [{"d": 2}, {"d": 3}], "e": [1, 2], "f": None}
    (row,) = collect.config_rows([published(Corpus, tmp_path, config=config)])
    assert row.stage == "ingest"
    assert row.config == [
        ("a.b", "1"), ("c[0].d", "2"), ("c[1].d", "3"), ("e", "[1, 2]"), ("f", "None"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.123"), (12345.6, "12,346"), (7, "7"), (True, "yes"), (2.0, "2"), ("x", "x")],
)
def test_values_are_short(value: Any, text: str) -> None:
    assert collect.format_value(value) == text


def test_times() -> None:
    assert collect.format_seconds(3.21) == "3.2 s"
    assert collect.format_seconds(125.4) == "2 min 05 s"
