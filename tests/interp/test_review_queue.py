"""The review queue: one label of each cluster first, and a uniform audit throughout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rldecoder.errors import DamagedFileError
from rldecoder.interp.records import FeatureLabel, FeatureLabels
from rldecoder.interp.review_queue import ReviewQueue, draw_audit, make_queue
from rldecoder.interp.review_queue import queue_scores as scores_of
from tests.interp.test_review import feature


def labels(*features: FeatureLabel, sae_digest: str = "abc") -> FeatureLabels:
    return FeatureLabels(
        model_name="tiny", hook_layer=2, num_latents=999, sae_digest=sae_digest, requested=10,
        features=list(features), labelled=len(features), failed=0,
        high_confidence_threshold=None, coverage=0.0,
    )  # fmt: skip


def order(queue: ReviewQueue) -> list[int]:
    return [entry.latent for entry in queue.entries]


def failed(latent: int) -> FeatureLabel:
    return feature(latent, 0.0, status="failed", label=None, failure="rare", predicate=None)


def test_importance_times_uncertainty() -> None:
    found = scores_of(np.array([1.0, 1.0, 2.0, -1.0]), np.array([0.5, 1.0, 0.9, 0.5]))
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.72, 1.0])
    same = [feature(0, 0.99), feature(1, 0.5), feature(2, 0.6, importance=3.0), feature(3, 0.5)]
    assert order(make_queue(labels(*same), {}, 0)) == [2, 1, 3, 0]


def test_of_a_cluster_only_the_first_comes_before_all_firsts() -> None:
    p = {1: 0.5, 2: 0.6, 3: 0.7, 4: 0.8, 5: 0.9}
    cluster = {1: 1, 2: 1, 3: 1, 4: 4, 5: 4}
    queue = make_queue(labels(*(feature(n, p[n]) for n in p)), cluster, 0)
    assert order(queue) == [1, 4, 2, 3, 5]
    assert [entry.why for entry in queue.entries] == ["first_of_cluster"] * 2 + [
        "rest_of_cluster"
    ] * 3
    assert [entry.cluster for entry in queue.entries] == [1, 4, 1, 1, 4]
    # A verdict on one member is a verdict for the cluster: its others wait behind the firsts.
    verdict = {"reviewer": "ann", "accept": True}
    some = [feature(n, p[n], reviews=[verdict] if n == 1 else []) for n in p]
    assert order(make_queue(labels(*some), cluster, 0)) == [4, 2, 3, 5, 1]


def test_failures_come_after_labels_and_before_what_was_reviewed() -> None:
    verdict = {"reviewer": "ann", "accept": True}
    some = [failed(0), feature(1, reviews=[verdict]), feature(2, 1.0), feature(3, 0.5)]
    queue = make_queue(labels(*some), {}, 0)
    assert order(queue) == [3, 2, 0, 1]
    assert [f.latent for f in queue.waiting(labels(*some), {3})] == [2, 0]


def test_the_audit_is_spread_evenly_and_does_not_follow_the_scores() -> None:
    size, drawn = 200, draw_audit(range(200), 0.1, seed=4)
    assert len(drawn) == 20
    rng = np.random.default_rng(0)
    some = [feature(n, float(rng.uniform(0.01, 0.99)), audit=n in drawn) for n in range(size)]
    queue = make_queue(labels(*some), {}, 7)
    for start in range(0, size, 10):
        assert sum(entry.audit for entry in queue.entries[start : start + 10]) == 1
    audit = [entry for entry in queue.entries if entry.audit]
    assert {entry.latent for entry in audit} == drawn
    assert all((entry.why == "audit") == entry.audit for entry in queue.entries)
    others = [entry.score for entry in queue.entries if not entry.audit]
    assert others == sorted(others, reverse=True)
    assert [e.score for e in audit] != sorted((e.score for e in audit), reverse=True)
    orders = {tuple(order(make_queue(labels(*some), {}, seed))) for seed in range(5)}
    assert len(orders) == 5


def test_the_first_of_the_audit_is_any_member_equally_often() -> None:
    # If the audit came by score, or by id, verdicts on a first part would be of a biased sample.
    some = [feature(n, 0.5 + n / 20, audit=n < 5) for n in range(10)]
    firsts = Counter(
        next(e.latent for e in make_queue(labels(*some), {}, seed).entries if e.audit)
        for seed in range(1000)
    )
    assert set(firsts) == set(range(5))
    assert all(140 < count < 260 for count in firsts.values())  # 200 each: 4.7 deviations


def test_the_draw_is_uniform_and_hardly_moves_when_labels_are_added() -> None:
    drawn = Counter(latent for seed in range(1000) for latent in draw_audit(range(20), 0.2, seed))
    assert sum(drawn.values()) == 4000
    assert all(140 < drawn[latent] < 260 for latent in range(20))
    small, large = draw_audit(range(400), 0.1, 3), draw_audit(range(440), 0.1, 3)
    assert len(small - large) <= 4
    assert draw_audit([], 0.1, 0) == draw_audit([1, 2], 0.0, 0) == frozenset()
    assert len(draw_audit([1, 2], 0.1, 0)) == 1  # a small run has an audit too


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("lafr"), st.integers(0, 3)), max_size=30),
    st.integers(0, 5),
)
def test_each_latent_stands_in_the_queue_once(kinds: list[tuple[str, int]], seed: int) -> None:
    verdict = {"reviewer": "ann", "accept": True}
    made = {
        "l": lambda n: feature(n),
        "a": lambda n: feature(n, audit=True),
        "f": failed,
        "r": lambda n: feature(n, reviews=[verdict]),
    }
    some = [made[kind](n) for n, (kind, _) in enumerate(kinds)]
    cluster = {n: group for n, (_, group) in enumerate(kinds)}
    queue = make_queue(labels(*some), cluster, seed)
    assert sorted(order(queue)) == list(range(len(kinds)))
    assert queue.ranks() == {latent: rank for rank, latent in enumerate(order(queue), 1)}
    firsts = [e.cluster for e in queue.entries if e.why == "first_of_cluster"]
    assert len(firsts) == len(set(firsts))


def test_a_queue_is_kept_and_belongs_to_its_labels(tmp_path: Path) -> None:
    ours = labels(feature(1), feature(2))
    queue = make_queue(ours, {2: 1}, 0)
    path = tmp_path / "queue.json"
    with pytest.raises(DamagedFileError, match=path.name):
        ReviewQueue.load_for(ours, path)
    queue.save(path)
    assert ReviewQueue.load_for(ours, path) == queue
    for other in (labels(feature(1)), labels(feature(1), feature(2), sae_digest="x")):
        with pytest.raises(DamagedFileError, match="other labels"):
            ReviewQueue.load_for(other, path)
    path.write_text(path.read_text().replace('"audit": false', '"audit": 7'))
    with pytest.raises(DamagedFileError, match="audit: "):
        ReviewQueue.load_for(ours, path)
