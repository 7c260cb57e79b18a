"""What a card says of its latent's relatives."""

from __future__ import annotations

from typing import Any

from rldecoder.dashboard.relations import MAX_SHOWN, Relations
from rldecoder.interp.cluster_record import ClusterRecord


def cluster_record(
    clusters: list[list[int]], flagged: dict[int, list[str]], links: list[tuple[int, int]]
) -> ClusterRecord:
    """Members of each cluster, reasons by latent, and who is absorbed by whom."""
    return ClusterRecord.model_validate(
        {
            "sae_digest": "s", "num_tokens": 9, "aliases": {}, "counts": {}, "thresholds": {},
            "clusters": [
                {"representative": of[0], "members": of, "label": None, "importance": 0.0}
                for of in clusters
            ],
            "flagged": [{"latent": key, "reasons": value} for key, value in flagged.items()],
            "absorption": [
                {"latent": one, "absorbed_by": other, "cells": 9, "share": 0.5}
                for one, other in links
            ],
        }
    )  # fmt: skip


RECORD = cluster_record(
    [[3, 8, 5], [9], [100, *range(200, 230)]],
    {8: ["ultra_dense", "label_failed"]},
    [(9, 3), (9, 4), (7, 3)],
)


def test_each_latent_gets_what_there_is_of_it() -> None:
    relations = Relations(RECORD)

    def of(latent: int) -> dict[str, Any]:
        return relations.of(latent).model_dump(mode="json")

    cluster = {"size": 3, "members": [3, 8, 5]}
    assert of(3) == {"cluster": cluster, "absorbs": [9, 7]}
    assert of(8) == {
        "cluster": cluster, "alias_of": 3, "flags": ["ultra dense", "label failed"],
    }  # fmt: skip
    assert of(9) == {"absorbed_by": [3, 4]}  # alone in its cluster
    assert of(7) == {"absorbed_by": [3]}
    assert of(1) == {}


def test_long_clusters_are_cut_and_say_how_long_they_are() -> None:
    found = Relations(RECORD).of(229)
    assert found.cluster is not None
    assert found.cluster.size == 31
    assert found.cluster.members == (100, *range(200, 200 + MAX_SHOWN - 1))
    assert found.alias_of == 100
