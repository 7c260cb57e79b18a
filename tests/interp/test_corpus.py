from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.interp.corpus import (
    UNKNOWN,
    TokenGrid,
    document_folds,
    read_firings,
    with_documents,
)
from rldecoder.interp.predicate import evaluate
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
    assert grid.shifted(-1).tolist() == [[UNKNOWN, 0, 1, 2], [UNKNOWN, 4, 5, 6]]
    assert grid.shifted(-4).tolist() == [[UNKNOWN] * 4] * 2
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
