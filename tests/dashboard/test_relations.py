"""What a card says of its latent's relatives."""

from __future__ import annotations

from pathlib import Path

from rldecoder.dashboard.relations import MAX_SHOWN, Relations, read_relations
from rldecoder.schemas import write_json

CLUSTERS = {
    "clusters": [
        {"members": [3, 8, 5]},
        {"members": [9]},
        {"members": [100, *range(200, 230)]},
    ],
    "flagged": [{"latent": 8, "reasons": ["ultra_dense", "label_failed"]}],
    "absorption": [
        {"latent": 9, "absorbed_by": 3},
        {"latent": 9, "absorbed_by": 4},
        {"latent": 7, "absorbed_by": 3},
    ],
}


def test_each_latent_gets_what_there_is_of_it() -> None:
    relations = Relations(CLUSTERS)
    cluster = {"size": 3, "members": [3, 8, 5]}
    assert relations.of(3) == {"cluster": cluster, "absorbs": [9, 7]}
    assert relations.of(8) == {
        "cluster": cluster, "alias_of": 3, "flags": ["ultra dense", "label failed"],
    }  # fmt: skip
    assert relations.of(9) == {"absorbed_by": [3, 4]}  # alone in its cluster
    assert relations.of(1) == {}


def test_long_clusters_are_cut_and_say_how_long_they_are() -> None:
    found = Relations(CLUSTERS).of(229)
    assert found["cluster"]["size"] == 31
    assert found["cluster"]["members"] == [100, *range(200, 200 + MAX_SHOWN - 1)]
    assert found["alias_of"] == 100


def test_read_from_an_artifact_or_nothing(tmp_path: Path) -> None:
    assert read_relations(tmp_path).of(3) == {}
    write_json(tmp_path / "clusters.json", CLUSTERS)
    assert read_relations(tmp_path).of(7) == {"absorbed_by": [3]}
