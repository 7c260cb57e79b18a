"""Absorption links: planted ones are found, companions are not, and a naive loop agrees."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from rldecoder.config.interp import ClusterFeaturesConfig
from rldecoder.interp import absorption
from rldecoder.interp.absorption import absorption_links

LIMITS = ClusterFeaturesConfig()
GENERAL, SPECIAL, COMPANION, ELSEWHERE, WEAK = range(5)
CELLS = 400


@pytest.fixture
def planted() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The general latent's label holds on the first 100 cells; on 30 of them it is silent. There:

    20 cells: the special latent, which writes along the general one's direction too;
    all 100: a companion of the same direction that fires with it (and so explains nothing);
    20 cells: one that fires mostly outside of the label; 10 cells: one that writes too little.
    """
    holds = np.arange(CELLS) < 100
    acts = np.zeros((5, CELLS))
    acts[GENERAL, :70] = 2.0
    acts[SPECIAL, 70:90] = 3.0
    acts[COMPANION, :100] = 0.5
    acts[ELSEWHERE, 80:300] = 1.5
    acts[WEAK, 90:100] = 0.1
    directions = np.eye(5, 8)
    directions[SPECIAL] = [0.6, 0.8, 0, 0, 0, 0, 0, 0]
    directions[COMPANION] = [0.9, 0, 0.1, 0, 0, 0, 0, 0]
    directions[ELSEWHERE] = [0.7, 0, 0, 0.7, 0, 0, 0, 0]
    directions[WEAK] = [0.9, 0, 0, 0, 0.1, 0, 0, 0]
    return holds, acts, directions


def test_the_planted_link_is_found_and_nothing_else(planted) -> None:
    holds, acts, directions = planted
    (link,) = absorption_links([(GENERAL, holds)], sparse.csr_array(acts), directions, LIMITS)
    assert (link.general, link.special) == (GENERAL, SPECIAL)
    assert (link.misses, link.absorbed) == (30, 20)
    assert link.share == pytest.approx(20 / 30)
    assert link.cosine == pytest.approx(0.6)
    assert link.strength == pytest.approx(3.0 * 0.6 / 2.0)
    assert (link.inside, link.together) == (1.0, 0.0)


@pytest.mark.parametrize(
    "changes", [{"strength": 0.95}, {"cosine": 0.7}, {"cells": 21}, {"share": 0.7}]
)
def test_each_limit_can_refuse_it(planted, changes: dict[str, float]) -> None:
    holds, acts, directions = planted
    limits = LIMITS.model_copy(update={f"absorption_{key}": new for key, new in changes.items()})
    assert absorption_links([(GENERAL, holds)], sparse.csr_array(acts), directions, limits) == []


def test_a_latent_that_never_misses_or_never_fires_has_no_link(planted) -> None:
    _, acts, directions = planted
    matrix = sparse.csr_array(acts)
    assert absorption_links([(GENERAL, np.arange(CELLS) < 70)], matrix, directions, LIMITS) == []
    assert absorption_links([(SPECIAL, np.arange(CELLS) >= 300)], matrix, directions, LIMITS) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_naive_loop_agrees(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absorption, "INSIDE", 0.3)
    rng = np.random.default_rng(seed)
    acts = rng.uniform(0.2, 2, (12, 300)) * (rng.random((12, 300)) < 0.25)
    directions = rng.normal(size=(12, 4))
    labelled = [(latent, rng.random(300) < 0.4) for latent in range(6)]
    limits = ClusterFeaturesConfig(
        absorption_strength=0.3, absorption_cosine=0.05, absorption_cells=2, absorption_share=0.01
    )
    found = absorption_links(labelled, sparse.csr_array(acts), directions, limits)
    expected = set()
    for general, holds in labelled:
        unit = directions[general] / np.linalg.norm(directions[general])
        hits = [c for c in range(300) if holds[c] and acts[general, c] > 0]
        misses = [c for c in range(300) if holds[c] and acts[general, c] == 0]
        usual = np.median([acts[general, c] for c in hits]) * np.linalg.norm(directions[general])
        stands_in: dict[int, int] = {}
        for c in misses:
            firing = [s for s in range(12) if acts[s, c] > 0]
            if not firing:
                continue
            best = max(firing, key=lambda s: acts[s, c] * (directions[s] @ unit))
            cosine = directions[best] @ unit / np.linalg.norm(directions[best])
            strong = acts[best, c] * (directions[best] @ unit) >= limits.absorption_strength * usual
            if strong and cosine >= limits.absorption_cosine:
                stands_in[best] = stands_in.get(best, 0) + 1
        for special, count in stands_in.items():
            cells = np.flatnonzero(acts[special] > 0)
            together = np.mean([acts[special, c] > 0 for c in hits])
            beside = np.mean([acts[special, c] > 0 for c in misses])
            if count >= 2 and holds[cells].mean() >= 0.3 and together < beside:
                expected.add((general, special, count))
    assert {(link.general, link.special, link.absorbed) for link in found} == expected
    assert expected, "the comparison must be about something"
