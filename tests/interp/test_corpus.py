from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.interp.corpus import (
    TokenGrid,
    document_folds,
    read_firings,
    sample_sequences,
    with_documents,
)
from rldecoder.interp.predicate import UNKNOWN, evaluate, shifted
from rldecoder.sae.model import Sae, SaeSpec

if TYPE_CHECKING:
    from conftest import Planted


def test_firings_are_where_the_planted_predicates_hold(planted: Planted) -> None:
    grid, firings = planted.scored
    for row, predicate in enumerate(planted.predicates):
        held = evaluate(predicate, grid.tokens, planted.vocabulary) & grid.valid
        cells, acts = firings.row(row)
        assert cells.tolist() == np.flatnonzero(held).tolist()
        assert acts.min() > 0.4


def test_reading_equals_a_naive_loop_and_ignores_the_batch_size(planted: Planted) -> None:
    torch.manual_seed(0)
    size = len(planted.predicates)
    sae = Sae.random_init(SaeSpec(d_model=size, num_latents=40, k=5), seed=0)
    reader = ActivationReader(planted.cache, "test")
    latents = np.array([7, 3, 39])
    grid, firings = read_firings(
        reader, sae, split="test", latents=latents, max_tokens=700, batch_tokens=97
    )
    (batch,) = reader.ordered(700, columns=("resid",), max_tokens=700)
    assert batch.resid is not None
    dense = sae.encode_dense(batch.resid.float()).detach().numpy()
    expected = np.zeros((3, grid.num_cells), np.float32)
    for n in range(700):
        row = int(np.flatnonzero(grid.seq_ids == int(batch.seq_id[n]))[0])
        expected[:, row * grid.num_positions + int(batch.pos[n])] = dense[n, latents]
        assert grid.tokens[row, int(batch.pos[n])] == int(batch.token_id[n])
    np.testing.assert_allclose(firings.matrix.toarray(), expected, rtol=1e-5)
    assert firings.latents.tolist() == latents.tolist()
    assert grid.cells.size == 700
    assert not grid.valid[:, 0].any()
    assert (grid.tokens[~grid.valid] == UNKNOWN).all()


def test_of_a_long_text_the_firings_of_a_sample_are_kept(planted: Planted) -> None:
    size = len(planted.predicates)
    sae = Sae.random_init(SaeSpec(d_model=size, num_latents=40, k=5), seed=0)
    reader = ActivationReader(planted.cache, "test")
    seen = []
    whole = read_firings(reader, sae, split="test", max_tokens=700)
    chosen = whole.grid.seq_ids[1::2]
    assert 1 < chosen.size < whole.grid.seq_ids.size
    some = read_firings(
        reader, sae, split="test", max_tokens=700, batch_tokens=97, sequences=chosen,
        observe=lambda batch, found: seen.append(len(batch.seq_id)),
    )  # fmt: skip
    assert sum(seen) == 700  # examples and densities come from all of it
    np.testing.assert_array_equal(some.grid.tokens, whole.grid.tokens)
    grid, firings = some.only(chosen)
    assert grid.seq_ids.tolist() == chosen.tolist()
    np.testing.assert_array_equal(grid.tokens, whole.grid.tokens[1::2])
    np.testing.assert_array_equal(grid.valid, whole.grid.valid[1::2])
    np.testing.assert_array_equal(grid.docs, whole.grid.docs[1::2])
    shape = (40, *whole.grid.tokens.shape)
    expected = whole.firings.matrix.toarray().reshape(shape)[:, 1::2].reshape(40, -1)
    np.testing.assert_allclose(firings.matrix.toarray(), expected, rtol=1e-6)
    assert firings.matrix.has_sorted_indices
    np.testing.assert_array_equal(
        whole.only(chosen).firings.matrix.toarray(), whole.firings.matrix.toarray()
        .reshape(shape)[:, 1::2].reshape(40, -1),
    )  # fmt: skip


def test_the_sample_is_uniform_bounded_and_only_made_when_needed() -> None:
    table = pa.table({"seq_id": np.arange(100, 150)})
    assert sample_sequences(table, 10, of=200, size=200, seed=0) is None
    assert sample_sequences(table, 10, of=10**9, size=500, seed=0) is None
    drawn = np.zeros(50)
    for seed in range(500):
        ids = sample_sequences(table, 10, of=400, size=109, seed=seed)
        assert ids is not None
        assert ids.size == 10
        assert (np.diff(ids) > 0).all()
        drawn[ids - 100] += 1
    assert (drawn[40:] == 0).all()  # beyond what is read
    assert (np.abs(drawn[:40] - 125) < 50).all()  # five deviations


def test_within_and_select(planted: Planted) -> None:
    grid, firings = planted.fit
    keep = np.zeros(grid.num_cells, bool)
    keep[: grid.num_cells // 2] = True
    half = firings.within(keep)
    for row in range(3):
        cells, acts = firings.row(row)
        inside = cells < grid.num_cells // 2
        assert half.row(row)[0].tolist() == cells[inside].tolist()
        assert half.row(row)[1].tolist() == acts[inside].tolist()
    two = firings.select(np.array([4, 1]))
    assert two.latents.tolist() == [4, 1]
    assert two.row(0)[0].tolist() == firings.row(4)[0].tolist()
    assert two.counts.tolist() == firings.counts[[4, 1]].tolist()


def test_shift_and_restriction() -> None:
    tokens = np.arange(8).reshape(2, 4)
    grid = TokenGrid("test", np.arange(2), tokens, np.ones((2, 4), bool), tokens * 0)
    assert shifted(grid.tokens, -1).tolist() == [[UNKNOWN, 0, 1, 2], [UNKNOWN, 4, 5, 6]]
    assert shifted(grid.tokens, -4).tolist() == [[UNKNOWN] * 4] * 2
    assert grid.restricted(tokens > 5).cells.tolist() == [6, 7]


def test_documents_come_from_the_token_table() -> None:
    tokens = np.full((2, 5), UNKNOWN)
    tokens[:, 1:] = 9
    valid = tokens >= 0
    grid = TokenGrid("label", np.array([4, 6]), tokens, valid, np.full((2, 5), UNKNOWN))
    table = pa.table(
        {
            "seq_id": [6, 5, 4],
            "input_ids": [[3, 9, 9, 9, 9], [0] * 5, [2, 9, 9, 9, 9]],
            "doc_ids": [[8, 11], [1], [7]],
            "doc_starts": [[0, 3], [0], [0]],
        }
    )
    full = with_documents(grid, table)
    assert full.docs.tolist() == [[7] * 5, [8, 8, 8, 11, 11]]
    assert full.tokens[:, 0].tolist() == [2, 3]
    assert grid.docs.max() == UNKNOWN


@pytest.mark.parametrize("num_folds", [2, 3])
def test_folds_keep_documents_whole_and_are_of_similar_size(num_folds: int) -> None:
    rng = np.random.default_rng(0)
    docs = np.sort(rng.integers(0, 30, 40 * 25)).reshape(40, 25)
    grid = TokenGrid("label", np.arange(40), docs, docs >= 0, docs)
    folds = document_folds(grid, num_folds)
    for doc in np.unique(docs):
        assert np.unique(folds[docs == doc]).size == 1
    sizes = np.bincount(folds.reshape(-1), minlength=num_folds)
    assert sizes.min() > 0.8 * sizes.max()
