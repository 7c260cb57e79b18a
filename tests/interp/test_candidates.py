from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from rldecoder.config.interp import PredicateSettings
from rldecoder.interp.candidates import find_candidates, log_odds, objective
from rldecoder.interp.predicate import Affix, NgramIn, PositionRange, TokenClass, TokenIn, evaluate

if TYPE_CHECKING:
    from conftest import Planted


@pytest.mark.parametrize(
    ("kind", "oracle"), [("f1", f1_score), ("balanced_accuracy", balanced_accuracy_score)]
)
def test_objective_equals_sklearn(kind: str, oracle) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    truth, guess = rng.random(200) < 0.3, rng.random(200) < 0.4
    found = objective(kind, (truth & guess).sum(), guess.sum(), truth.sum(), truth.size)
    assert float(found) == pytest.approx(oracle(truth, guess))


def test_log_odds_prefer_support_among_equally_pure_tokens() -> None:
    odds = log_odds(np.array([1.0, 30.0, 0.0, 3.0]), np.array([1.0, 30.0, 30.0, 30.0]), 100, 1000)
    assert odds[1] > odds[0] > odds[3] > odds[2]
    assert odds[3] == pytest.approx(np.log(3.5 / 97.5) - np.log(27.5 / 873.5))


def test_every_planted_single_atom_is_among_the_candidates(planted: Planted) -> None:
    grid, firings = planted.fit
    found = find_candidates(grid, firings, planted.vocabulary, PredicateSettings())
    kinds = (TokenIn, Affix, TokenClass, PositionRange)
    for predicate, candidates in zip(planted.predicates, found, strict=True):
        if not isinstance(predicate, kinds):
            continue
        truth = evaluate(predicate, grid.tokens, planted.vocabulary) & grid.valid
        masks = [evaluate(atom, grid.tokens, planted.vocabulary) for atom in candidates]
        assert max(_f1(truth, mask & grid.valid) for mask in masks) > 0.99, predicate


def _f1(truth: np.ndarray, guess: np.ndarray) -> float:
    return float(2 * (truth & guess).sum() / (truth.sum() + guess.sum()))


def test_bigrams_are_found(planted: Planted) -> None:
    rng = np.random.default_rng(5)
    grid, firings = planted.fit
    tokens = rng.integers(0, 6, grid.tokens.shape)
    small = type(grid)("label", grid.seq_ids, tokens, grid.valid, grid.docs)
    wanted = NgramIn(ngrams=((1, 2), (4, 3)))
    held = evaluate(wanted, tokens, planted.vocabulary) & grid.valid
    from scipy import sparse

    matrix = sparse.csr_array(held.reshape(1, -1).astype(np.float32))
    one = type(firings)(np.array([0]), matrix)
    (candidates,) = find_candidates(small, one, planted.vocabulary, PredicateSettings())
    assert wanted in candidates


def test_a_silent_latent_has_no_candidates(planted: Planted) -> None:
    grid, firings = planted.fit
    nothing = firings.within(np.zeros(grid.num_cells, bool))
    found = find_candidates(grid, nothing, planted.vocabulary, PredicateSettings())
    assert found == [[] for _ in planted.predicates]
