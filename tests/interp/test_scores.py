from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score

from rldecoder.interp.corpus import TokenGrid
from rldecoder.interp.predicate import TokenIn
from rldecoder.interp.records import Scores
from rldecoder.interp.scores import (
    SCORES,
    SUMMARISED,
    LabelScores,
    ScoringText,
    derangement,
    intruder_score,
    means,
)
from rldecoder.interp.simulation import fit_levels
from rldecoder.interp.vocabulary import Vocabulary

ROWS, WIDTH, WINDOW = 30, 22, 8
VOCABULARY = Vocabulary([f" w{i}" for i in range(40)])


@pytest.fixture
def text() -> ScoringText:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (ROWS, WIDTH))
    valid = np.ones((ROWS, WIDTH), bool)
    valid[:, 0] = False
    valid[-1, 5:] = False
    return ScoringText(
        TokenGrid("test", np.arange(ROWS), tokens, valid, tokens * 0), VOCABULARY, WINDOW
    )


def _random(text: ScoringText, rate: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random(text.grid.num_cells) < rate) & text.valid


def _score(text: ScoringText, held: np.ndarray | None, fires: np.ndarray) -> LabelScores:
    cells = np.flatnonzero(fires)
    acts = np.random.default_rng(1).uniform(0.35, 1, cells.size).astype(np.float32)
    return text.score(held, cells, acts, np.random.default_rng(0))


def test_population_scores_equal_sklearn(text: ScoringText) -> None:
    fires, held = _random(text, 0.1, 1), _random(text, 0.2, 2)
    held |= fires & _random(text, 0.7, 3)
    found = _score(text, held, fires)
    truth, guess = fires[text.valid], held[text.valid]
    assert found.f1 == pytest.approx(f1_score(truth, guess))
    assert found.precision == pytest.approx((truth & guess).sum() / guess.sum())
    assert found.recall == pytest.approx((truth & guess).sum() / truth.sum())
    assert found.auprc == pytest.approx(average_precision_score(truth, guess))
    assert found.base_rate == pytest.approx(truth.mean())


def test_detection_equals_a_loop_over_all_windows(text: ScoringText) -> None:
    fires, held = _random(text, 0.05, 1), _random(text, 0.05, 2)
    held |= fires & _random(text, 0.5, 3)
    truth, guess = [], []
    grid_fires, grid_held = fires.reshape(ROWS, WIDTH), held.reshape(ROWS, WIDTH)
    for row in range(ROWS):
        for start in range(0, WIDTH, WINDOW):
            part = slice(start, start + WINDOW)
            if text.grid.valid[row, part].any():
                truth.append(grid_fires[row, part].any())
                guess.append(grid_held[row, part].any())
    found = _score(text, held, fires)
    assert found.detection == pytest.approx(balanced_accuracy_score(truth, guess))
    assert found.detection_positive == sum(truth)
    assert found.detection_negative == len(truth) - sum(truth)


def test_a_perfect_label_scores_one_and_its_opposite_little(text: ScoringText) -> None:
    fires = _random(text, 0.08, 4)
    perfect = _score(text, fires, fires)
    assert perfect.detection == perfect.f1 == perfect.auprc == perfect.fuzzing == 1.0
    assert perfect.fuzzing_windows > 10
    opposite = _score(text, ~fires & text.valid, fires)
    assert opposite.fuzzing == 0.0
    assert opposite.f1 == 0.0
    everything = _score(text, text.valid, fires)
    assert everything.detection == everything.fuzzing == 0.5


def test_fuzzing_of_an_unrelated_label_is_at_chance(text: ScoringText) -> None:
    values = [
        _score(text, _random(text, 0.5, 100 + i), _random(text, 0.08, 4)).fuzzing for i in range(40)
    ]
    assert np.mean([v for v in values if v is not None]) == pytest.approx(0.5, abs=0.05)


def test_fuzzing_marks_as_many_weak_tokens_as_strong_ones(text: ScoringText) -> None:
    # One window: cells 1..7 of row 0. Two strong tokens, one weak firing, four silent tokens.
    cells = np.array([2, 3, 5])
    acts = np.array([1.0, 0.5, 0.1], np.float32)
    held = np.zeros(text.grid.num_cells, bool)
    held[[2]] = True
    rng = np.random.default_rng(0)
    found = text.score(held, cells, acts, rng)
    assert found.fuzzing_windows == 1
    # Half of the two marked tokens is enough; no weak token is named, so no decoy is accepted.
    assert found.fuzzing == 1.0
    crowded = np.arange(1, 8)
    full = text.score(held, crowded, np.ones(7, np.float32), rng)
    assert full.fuzzing is None


def test_a_failed_label_is_wrong_everywhere(text: ScoringText) -> None:
    found = _score(text, None, _random(text, 0.08, 4))
    assert (found.detection, found.fuzzing, found.f1, found.precision, found.auprc) == (0.0,) * 5
    assert (found.detection_hard, found.fuzzing_hard, found.intruder, found.simulation) == (
        0.0,
    ) * 4


def test_scores_without_firings_are_undefined(text: ScoringText) -> None:
    found = _score(text, _random(text, 0.1, 3), np.zeros(text.grid.num_cells, bool))
    assert found.recall is None
    assert found.auprc is None
    assert found.detection is None
    assert found.fuzzing is None
    assert found.precision == 0.0
    assert found.f1 == 0.0


def test_predicates_do_not_hold_on_invalid_cells(text: ScoringText) -> None:
    held = text.holds(TokenIn(tokens=tuple(range(40))))
    assert (held == text.valid).all()


@pytest.mark.parametrize("size", [2, 3, 17])
def test_derangement_has_no_fixed_point(size: int) -> None:
    order = derangement(size, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(size))
    assert (order != np.arange(size)).all()


def test_means_leave_undefined_values_out(text: ScoringText) -> None:
    fires = _random(text, 0.1, 3)
    found = _score(text, fires, fires)
    some = [found.model_copy(update={"f1": f1, "recall": None}) for f1 in (None, 1.0, 0.0)]
    assert means(some, ("f1", "recall")) == {"f1": 0.5, "recall": None}


def test_the_table_the_record_and_the_means_name_the_same_scores(text: ScoringText) -> None:
    assert set(SCORES.names) == {"latent", "method", "labelled", *LabelScores.model_fields}
    assert set(SUMMARISED) < set(Scores.model_fields) < set(LabelScores.model_fields)
    fires = _random(text, 0.1, 3)
    found = _score(text, fires, fires)
    assert type(found.published) is Scores
    assert found.published.model_dump().items() <= found.model_dump().items()


def test_near_misses_are_quiet_windows_with_tokens_it_fires_on(text: ScoringText) -> None:
    # The latent fires on token 7, but only in the first ten rows.
    tokens = text.grid.tokens
    fires = np.flatnonzero(((tokens == 7) & text.grid.valid)[:10])
    hardness = text.near.hardness(fires)
    total = ((tokens == 7) & text.grid.valid).sum()
    expected = np.where((tokens == 7) & text.grid.valid, fires.size / total, 0)
    np.testing.assert_allclose(hardness, expected.reshape(-1))
    held = text.holds(TokenIn(tokens=(7,)))
    found = text.score(held, fires, np.ones(fires.size, np.float32), np.random.default_rng(0))
    # It holds in every active window and in every near miss, but in few of the quiet windows.
    assert found.detection_hard == 0.5
    assert found.detection is not None
    assert found.detection > 0.7
    quiet = np.unique(text.window_of[(tokens == 7).reshape(-1) & text.valid])
    active = np.unique(text.window_of[fires])
    assert found.near_misses == min(active.size, np.setdiff1d(quiet, active).size)


def test_near_misses_of_a_restricted_grid_count_its_cells_only(text: ScoringText) -> None:
    # Tokens above 20 occur only in rows that do not count.
    tokens = np.minimum(text.grid.tokens, 19)
    tokens[10:] = 30
    keep = np.zeros(tokens.shape, bool)
    keep[:10] = True
    grid = replace(text.grid, tokens=tokens).restricted(keep)
    part = ScoringText(grid, VOCABULARY, WINDOW)
    fires = np.flatnonzero((tokens == 3) & grid.valid)
    np.testing.assert_allclose(
        part.near.hardness(fires), ((tokens == 3) & grid.valid).reshape(-1).astype(float)
    )


def test_hard_decoys_of_fuzzing_are_near_misses(text: ScoringText) -> None:
    # Windows hold token 7 where it fires and, silent, token 7 once more; other tokens differ.
    tokens = np.tile(np.arange(10, 10 + WIDTH), (ROWS, 1))
    tokens[:, 2], tokens[:, 4] = 7, 7
    grid = TokenGrid("test", np.arange(ROWS), tokens, text.grid.valid, tokens * 0)
    world = ScoringText(grid, VOCABULARY, WINDOW)
    fires = np.arange(20) * WIDTH + 2
    held = world.holds(TokenIn(tokens=(7,)))
    found = world.score(held, fires, np.ones(20, np.float32), np.random.default_rng(0))
    assert found.fuzzing_hard == 0.5
    assert found.fuzzing is not None
    assert found.fuzzing > 0.8
    assert found.detection_hard == 0.5


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.9, 0.1), (0.5, 0.5), (0.2, 0.8), (1.0, 1.0)])
def test_intruder_equals_a_simulation_of_the_game(a: float, b: float) -> None:
    rng = np.random.default_rng(0)
    active, quiet = np.arange(100) < 100 * a, np.arange(100) < 100 * b
    right = 0
    for _ in range(4000):
        shown = [*rng.choice(active, 4), rng.choice(quiet)]
        silent = [i for i, held in enumerate(shown) if not held] or range(5)
        right += rng.choice(list(silent)) == 4
    found = intruder_score(active, quiet)
    assert found == pytest.approx((right / 4000 - 0.2) / 0.8, abs=0.03)
    if a == b:
        assert found == pytest.approx(0)
    assert intruder_score(active, quiet[:0]) is None


def test_intruder_asks_about_strong_windows_only(text: ScoringText) -> None:
    # Strong in row 0, weak in row 1; the label knows only the strong one.
    cells, acts = np.array([3, WIDTH + 3]), np.array([1.0, 0.1], np.float32)
    held = np.zeros(text.grid.num_cells, bool)
    held[3] = True
    found = text.score(held, cells, acts, np.random.default_rng(0))
    assert found.intruder == pytest.approx(1.0)
    assert found.detection == 0.75


def test_simulation_equals_numpy(text: ScoringText) -> None:
    rng = np.random.default_rng(2)
    fires = np.flatnonzero(_random(text, 0.1, 1))
    acts = rng.uniform(0.1, 3, fires.size).astype(np.float32)
    held = _random(text, 0.1, 5)
    held[fires[::2]] = True
    other = np.flatnonzero(_random(text, 0.2, 9))
    levels = fit_levels(held, other, np.ones(other.size, np.float32), int(text.valid.sum()))
    real = np.zeros(text.grid.num_cells)
    real[fires] = acts
    fitted = np.zeros(text.grid.num_cells)
    fitted[other] = 1
    assert levels.held == pytest.approx(fitted[held].mean())
    assert levels.silent == pytest.approx(fitted[text.valid & ~held].mean())
    guess = np.where(held, levels.held, levels.silent)[text.valid]
    real = real[text.valid]
    found = text.score(held, fires, acts, np.random.default_rng(0), levels)
    assert found.simulation == pytest.approx(np.corrcoef(guess, real)[0, 1])
    explained = 1 - np.mean((guess - real) ** 2) / real.var()
    assert found.simulation_explained == pytest.approx(explained)
    assert _score(text, held, _random(text, 0.1, 1)).simulation_explained is None


def test_simulation_that_says_nothing_has_no_correlation(text: ScoringText) -> None:
    fires = _random(text, 0.1, 1)
    assert _score(text, text.valid, fires).simulation == 0.0
    silent = _score(text, text.valid, np.zeros(text.grid.num_cells, bool))
    assert silent.simulation is None
    assert silent.intruder is None
    assert silent.detection_hard is None
