from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rldecoder.artifacts.catalogue import (
    Clusters,
    FinalDecoder,
    Labels,
    ModelFolder,
    TrainedSae,
)
from rldecoder.config.interp import ClusterFeaturesConfig, LabelFeaturesConfig, RankFeaturesConfig
from rldecoder.interp.review_queue import queue_scores
from rldecoder.stages.table import stage_named
from tests.stages.interp_inputs import Folders, make_inputs, run_stage
from tests.stages.published import published

STAGE = stage_named("cluster_features")

RANK = RankFeaturesConfig(
    domains=("label",), budget_tokens=256, validation_tokens=48, validation_top=3,
    validation_others=3,
)  # fmt: skip
LABEL = LabelFeaturesConfig(num_features=96, control_features=2, control_tokens=600)
CONFIG = ClusterFeaturesConfig(num_probe_tokens=64)


def _plant_twins(inputs: Folders, names: tuple[int, int, int]) -> None:
    """Make latent b a copy of a in the SAE and the decoder, and c one in the SAE only."""
    a, b, c = names
    trained = published(TrainedSae, inputs["train_sae"])
    final = published(FinalDecoder, inputs["freeze_decoder"])
    sae, lm = trained.load(), published(ModelFolder, inputs["sync_tokenizer"]).load()
    decoder = final.load(lm, sae)
    with torch.no_grad():
        for twin in (b, c):
            sae.W_enc[:, twin] = sae.W_enc[:, a]
            sae.W_dec[twin] = sae.W_dec[a]
        decoder.W[b] = decoder.W[a]
    sae.save(trained.sae)
    decoder.save_pretrained(final.decoder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> Folders:
    folder = tmp_path_factory.mktemp("cluster")
    made = make_inputs(folder, tiny_lm_dir)
    _plant_twins(made, (10, 20, 30))
    run_stage(stage_named("rank_features"), made, RANK, folder / "rank")
    run_stage(stage_named("label_features"), made, LABEL, folder / "label")
    return made


def test_only_twins_whose_ablation_agrees_are_merged(tmp_path: Path, inputs: Folders) -> None:
    latents = {f.latent for f in published(Labels, inputs["label_features"]).labels.features}
    assert {10, 20, 30} <= latents, "the planted twins must be among the labelled latents"
    output, out = run_stage(STAGE, inputs, CONFIG, tmp_path / "cluster")
    artifact = published(Clusters, out, output)
    result, table = artifact.clusters, artifact.pairs
    assert table.schema == Clusters.pairs.schema
    pairs = {frozenset((r["latent_a"], r["latent_b"])): r for r in table.to_pylist()}
    same, other = pairs[frozenset((10, 20))], pairs[frozenset((10, 30))]
    for row in (same, other):
        assert row["decoder_cosine"] == pytest.approx(1)
        assert row["jaccard"] > 0.5  # the k-th place falls to one twin alone
        assert row["votes"] >= 2
    assert same["agree"]
    assert same["merged"]
    assert same["fingerprint_cosine"] > 0.99
    assert not other["agree"]
    assert not other["merged"]
    assert other["fingerprint_cosine"] < 0.9

    twins = next(cluster.members for cluster in result.clusters if 10 in cluster.members)
    assert {10, 20} <= set(twins)
    assert 30 not in twins
    alias = result.aliases
    assert {10, 20} & set(alias)
    members = sorted(m for cluster in result.clusters for m in cluster.members)
    assert members == sorted(latents), "every latent keeps its id in exactly one cluster"
    labels = published(Labels, inputs["label_features"]).labels
    queue = artifact.load_queue(labels)
    of = {f.latent: f for f in labels.features}
    for entry in queue.entries:
        assert entry.cluster == alias.get(entry.latent, entry.latent)
        assert entry.audit == of[entry.latent].audit
        p, importance = of[entry.latent].confidence, of[entry.latent].importance
        assert entry.score == queue_scores(np.array([importance]), np.array([p]))[0]
    twins_why = [entry.why for entry in queue.entries if entry.latent in twins]
    assert twins_why.count("first_of_cluster") <= 1
    assert "rest_of_cluster" in twins_why
    assert output.metrics["clusters"] == len(result.clusters)
    assert output.metrics["pairs_agreeing"] >= 1


def test_absorption_links_are_published(tmp_path: Path, inputs: Folders) -> None:
    loose = {"absorption_strength": 0.1, "absorption_cosine": -1.0, "absorption_cells": 1}
    config = CONFIG.model_copy(update={**loose, "absorption_share": 0.0})
    output, out = run_stage(STAGE, inputs, config, tmp_path / "absorbed")
    artifact = published(Clusters, out)
    table = artifact.absorption
    assert table.schema == Clusters.absorption.schema
    rows = table.to_pylist()
    assert rows
    assert output.metrics["absorption_links"] == len(rows)
    listed = artifact.clusters.absorption
    assert [(link.latent, link.absorbed_by, link.cells) for link in listed] == [
        (row["general"], row["special"], row["absorbed"]) for row in rows
    ]
    of = {f.latent: f for f in published(Labels, inputs["label_features"]).labels.features}
    assert all(of[row["general"]].input_predicate is not None for row in rows)
    # Ablated too, as far as both fire in the text that is searched.
    assert any(row["fingerprint_cosine"] is not None for row in rows)


def test_label_embeddings_stand_beside_the_predicates(tmp_path: Path, inputs: Folders) -> None:
    config = CONFIG.model_copy(update={"label_embedding": "minilm"})
    _, out = run_stage(STAGE, inputs, config, tmp_path / "embedded")
    of = {f.latent: f for f in published(Labels, inputs["label_features"]).labels.features}
    artifact = published(Clusters, out)
    rows = artifact.pairs.to_pylist()
    assert any(row["label_cosine"] is not None for row in rows)
    for row in rows:
        a, b = of[row["latent_a"]].label, of[row["latent_b"]].label
        assert (row["label_cosine"] is None) == (a is None or b is None)
        if a is not None and a == b:
            assert row["label_cosine"] == pytest.approx(1)
    # Ablation still has the last word: each member agrees with its representative.
    agree = {frozenset((row["latent_a"], row["latent_b"])) for row in rows if row["agree"]}
    for cluster in artifact.clusters.clusters:
        for member in cluster.members[1:]:
            assert frozenset((cluster.representative, member)) in agree


def test_low_quality_latents_are_flagged(tmp_path: Path, inputs: Folders) -> None:
    labels = published(Labels, inputs["label_features"]).labels
    _, out = run_stage(STAGE, inputs, CONFIG, tmp_path / "cluster")
    result = published(Clusters, out).clusters
    flagged = {entry.latent: entry.reasons for entry in result.flagged}
    failed = {f.latent for f in labels.features if f.status == "failed"}
    assert failed == {latent for latent, reasons in flagged.items() if "label_failed" in reasons}
    # 8 of 96 latents fire on each token: a share of 1/12 on average, and some more than 0.1.
    assert result.counts["ultra_dense"] > 0
    strict = CONFIG.model_copy(update={"ultra_dense": 1.0})
    _, out = run_stage(STAGE, inputs, strict, tmp_path / "strict")
    assert published(Clusters, out).clusters.counts["ultra_dense"] == 0
