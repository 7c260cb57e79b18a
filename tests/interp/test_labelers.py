from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import sparse

from rldecoder.config.interp import PredicateSettings
from rldecoder.interp.corpus import Firings, SplitFirings
from rldecoder.interp.labelers import Evidence, PredicateLabeler
from rldecoder.interp.labelling import label_and_score, shuffled_control
from rldecoder.interp.predicate import describe, num_atoms

if TYPE_CHECKING:
    from conftest import Planted


@pytest.mark.parametrize("objective", ["f1", "balanced_accuracy"])
def test_planted_features_are_recovered_and_controls_are_at_chance(
    planted: Planted, objective: str
) -> None:
    labeler = PredicateLabeler(PredicateSettings.model_validate({"objective": objective}))
    rng = np.random.default_rng(0)
    found = label_and_score(labeler, planted.fit, planted.scored, planted.vocabulary, 16, rng)
    detection = [scores.detection for scores in found.scores]
    recovered = [value is not None and value >= 0.95 for value in detection]
    failures = [
        describe(predicate, planted.vocabulary)
        for predicate, good in zip(planted.predicates, recovered, strict=True)
        if not good
    ]
    assert np.mean(recovered) >= 0.95, failures
    for name in ("detection", "fuzzing", "fuzzing_hard", "f1", "intruder"):
        assert np.mean([getattr(scores, name) for scores in found.scores]) >= 0.95, name
    # What a predicate says is yes or no; planted activations vary from 0.5 to 2.
    assert np.mean([scores.simulation for scores in found.scores]) >= 0.9
    # One shuffle leaves some labels with a latent of like meaning: the mean over several.
    shuffles = [
        shuffled_control(found, planted.scored, planted.vocabulary, 16, rng) for _ in range(8)
    ]
    for name, chance in (
        ("detection", 0.5), ("fuzzing", 0.5), ("intruder", 0.0), ("simulation", 0.0),
    ):  # fmt: skip
        scores = [getattr(s, name) for shuffled in shuffles for s in shuffled.scores]
        assert np.mean([s for s in scores if s is not None]) == pytest.approx(chance, abs=0.05)
    for drafts in (shuffled.drafts for shuffled in shuffles):
        assert all(d.latent != o.latent or d.predicate != o.predicate
                   for d, o in zip(found.drafts, drafts, strict=True))  # fmt: skip


def test_planted_features_are_recovered_from_noisy_firings(planted: Planted) -> None:
    """One firing in twenty is missing, and as many stray ones stand anywhere."""
    rng = np.random.default_rng(2)
    labeler = PredicateLabeler(PredicateSettings())
    noisy = [
        split._replace(firings=_noisy(split, 0.05, rng)) for split in (planted.fit, planted.scored)
    ]
    # Clean text says whether the meaning was found; noisy text bounds what can be scored.
    found = label_and_score(labeler, noisy[0], planted.scored, planted.vocabulary, 16, rng)
    detection = [scores.detection or 0.0 for scores in found.scores]
    assert np.mean([value >= 0.95 for value in detection]) >= 0.95, detection
    scored = label_and_score(labeler, noisy[0], noisy[1], planted.vocabulary, 16, rng)
    means = {
        name: np.mean([getattr(s, name) for s in scored.scores])
        for name in ("detection", "fuzzing", "f1")
    }
    assert all(0.9 <= mean < 0.99 for mean in means.values()), means


def _noisy(split: SplitFirings, share: float, rng: np.random.Generator) -> Firings:
    """The same latents with a share of their firings dropped, and as many added elsewhere."""
    rows = []
    for row in range(split.firings.latents.size):
        cells, acts = split.firings.row(row)
        kept = rng.random(cells.size) >= share
        quiet = np.setdiff1d(split.grid.cells, cells)
        stray = rng.choice(quiet, int((~kept).sum()), replace=False)
        values = np.concatenate([acts[kept], rng.uniform(0.5, 2, stray.size)])
        rows.append((np.concatenate([cells[kept], stray]), values.astype(np.float32)))
    starts = np.cumsum([0, *(cells.size for cells, _ in rows)])
    matrix = sparse.csr_array(
        (np.concatenate([v for _, v in rows]), np.concatenate([c for c, _ in rows]), starts),
        shape=(len(rows), split.grid.num_cells),
    )
    matrix.sort_indices()
    return Firings(split.firings.latents, matrix)


def test_latents_that_know_nothing_of_the_text_are_at_chance(planted: Planted) -> None:
    """The random-SAE control of the planted world: as many firings as planted, anywhere."""
    rng = np.random.default_rng(1)
    # Every label the labeler can find is scored, however bad.
    labeler = PredicateLabeler(PredicateSettings(min_score=0.0))
    counts = planted.fit.firings.counts
    fit = planted.fit._replace(firings=_scattered(planted.fit, counts, rng))
    scored = planted.scored._replace(firings=_scattered(planted.scored, counts, rng))
    found = label_and_score(labeler, fit, scored, planted.vocabulary, 16, rng)
    assert sum(draft.predicate is not None for draft in found.drafts) > 20
    for name in ("detection", "detection_hard", "fuzzing", "fuzzing_hard"):
        scores = [getattr(s, name) for s in found.scores if getattr(s, name) is not None]
        assert np.mean(scores) == pytest.approx(0.5, abs=0.05), name


def _scattered(split: SplitFirings, counts: np.ndarray, rng: np.random.Generator) -> Firings:
    """Latents that fire on cells drawn at random, each as often as `counts` says."""
    cells = np.concatenate([rng.choice(split.grid.cells, count, replace=False) for count in counts])
    rows = np.repeat(np.arange(counts.size), counts)
    values = rng.uniform(0.5, 2, cells.size).astype(np.float32)
    matrix = sparse.csr_array((values, (rows, cells)), shape=(counts.size, split.grid.num_cells))
    matrix.sort_indices()
    return Firings(np.arange(counts.size), matrix)


def test_labels_are_deterministic_and_short(planted: Planted) -> None:
    labeler = PredicateLabeler(PredicateSettings(max_atoms=2))
    evidence = Evidence(planted.fit.grid, planted.fit.firings, planted.vocabulary)
    first, second = labeler.label(evidence), labeler.label(evidence)
    assert first == second
    for draft in first:
        assert draft.predicate is not None
        assert num_atoms(draft.predicate) <= 2
        assert draft.text == describe(draft.predicate, planted.vocabulary)


def _random_firings(split: SplitFirings, count: int, seed: int) -> Firings:
    rng = np.random.default_rng(seed)
    cells = rng.choice(split.grid.cells, count, replace=False)
    entries = (np.ones(count, np.float32), (np.zeros(count, int), cells))
    matrix = sparse.csr_array(entries, shape=(1, split.grid.num_cells))
    matrix.sort_indices()
    return Firings(np.array([5]), matrix)


def test_what_cannot_be_labelled_fails_with_a_reason_and_scores_nothing(planted: Planted) -> None:
    labeler = PredicateLabeler(PredicateSettings())
    rng = np.random.default_rng(0)
    for count, reason in ((4, "fewer than 10"), (300, "best predicate scores")):
        fit = planted.fit._replace(firings=_random_firings(planted.fit, count, 1))
        scored = planted.scored._replace(firings=_random_firings(planted.scored, count, 2))
        found = label_and_score(labeler, fit, scored, planted.vocabulary, 16, rng)
        (draft,), (scores,) = found
        assert draft.text is None
        assert draft.predicate is None
        assert draft.failure is not None
        assert reason in draft.failure
        assert scores.detection == scores.f1 == scores.fuzzing == scores.auprc == 0.0


def test_labels_use_only_valid_cells(planted: Planted) -> None:
    grid, firings = planted.fit
    half = np.zeros(grid.tokens.shape, bool)
    half[:120] = True
    labeler = PredicateLabeler(PredicateSettings())
    drafts = labeler.label(Evidence(grid.restricted(half), firings, planted.vocabulary))
    inside = firings.within((half & grid.valid).reshape(-1)).counts
    assert [draft.firings for draft in drafts] == inside.tolist()
