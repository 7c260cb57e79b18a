from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import sparse

from rldecoder.interp.corpus import Firings, TokenGrid
from rldecoder.interp.examples import (
    EXAMPLES,
    ExampleSettings,
    collect_examples,
    token_effects,
    top_examples,
)
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.schemas import read_parquet, write_parquet

if TYPE_CHECKING:
    from pathlib import Path

    from rldecoder.interp.importance import Subject

ROWS, WIDTH, WINDOW = 12, 20, 8


@pytest.fixture
def grid() -> TokenGrid:
    tokens = np.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) % 50
    valid = np.ones(tokens.shape, bool)
    valid[:, 0] = False
    return TokenGrid("label", np.arange(ROWS) + 100, tokens, valid, tokens * 0)


@pytest.fixture
def firings(grid: TokenGrid) -> Firings:
    rng = np.random.default_rng(0)
    dense = np.zeros((3, grid.num_cells), np.float32)
    for row, count in ((0, 40), (1, 2)):
        cells = rng.choice(grid.cells[: grid.cells.size // 2], count, replace=False)
        dense[row, cells] = rng.uniform(0.1, 5, count)
    return Firings(np.array([7, 3, 1]), sparse.csr_array(dense))


def _rows(columns: dict, **wanted: object) -> list[dict]:
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_examples(grid: TokenGrid, firings: Firings, tmp_path: Path) -> None:
    settings = ExampleSettings(WINDOW, num_top=4, num_quantile=3, num_negative=5)
    columns = collect_examples(grid, firings, settings, np.random.default_rng(0))
    dense = firings.matrix.toarray()
    top = _rows(columns, latent=7, kind="top")
    acts = [row["act"] for row in top]
    assert acts == sorted(acts, reverse=True)
    assert acts[0] == dense[0].max()
    windows = {(row["seq_id"], row["pos"] // WINDOW) for row in top}
    assert len(windows) == len(top) == 4
    quantile = _rows(columns, latent=7, kind="quantile")
    assert len(quantile) == 3
    assert max(row["act"] for row in quantile) <= acts[-1]
    assert not {(r["seq_id"], r["pos"] // WINDOW) for r in quantile} & windows
    assert len(_rows(columns, latent=3, kind="top")) == 2
    assert _rows(columns, latent=1, kind="top") == []
    for row in _rows(columns):
        latent_row = firings.latents.tolist().index(row["latent"])
        base = (row["seq_id"] - 100) * WIDTH
        span = slice(base + row["start"], base + row["start"] + len(row["tokens"]))
        assert row["tokens"] == grid.tokens.reshape(-1)[span].tolist()
        assert row["acts"] == dense[latent_row][span].tolist()
        assert row["start"] <= row["pos"] < row["start"] + len(row["tokens"])
        assert len(row["tokens"]) <= WINDOW
        if row["kind"] == "negative":
            assert sum(row["acts"]) == row["act"] == 0
        else:
            assert row["act"] == dense[latent_row][base + row["pos"]] > 0
    for latent in (7, 3, 1):
        assert len(_rows(columns, latent=latent, kind="negative")) == 5
    write_parquet(tmp_path / "examples.parquet", columns, EXAMPLES)
    assert read_parquet(tmp_path / "examples.parquet").num_rows == len(columns["latent"])


def test_no_negatives_where_a_latent_fires_everywhere(grid: TokenGrid) -> None:
    everywhere = Firings(
        np.array([0]), sparse.csr_array(grid.valid.reshape(1, -1).astype(np.float32))
    )
    settings = ExampleSettings(WINDOW, 2, 2, 5)
    columns = collect_examples(grid, everywhere, settings, np.random.default_rng(0))
    assert _rows(columns, kind="negative") == []


def test_shown_examples_carry_texts_and_focus(grid: TokenGrid, firings: Firings) -> None:
    columns = collect_examples(
        grid, firings, ExampleSettings(WINDOW, 4, 0, 0), np.random.default_rng(0)
    )
    vocabulary = Vocabulary([f" w{i}" for i in range(50)])
    shown = top_examples(columns, vocabulary, 2)
    assert len(shown[7]) == 2
    first = shown[7][0]
    row = first.seq_id - 100
    assert first.tokens[first.focus] == f" w{grid.tokens[row, first.pos]}"
    assert 1 not in shown


def test_token_effects_equal_the_full_product(subject: Subject) -> None:
    vocabulary = Vocabulary.from_tokenizer(subject.lm.tokenizer, subject.lm.vocab_size)
    latents = np.arange(70)
    found = token_effects(subject.decoder, latents, vocabulary, 5)
    assert len(found) == 70
    logits = subject.decoder.W @ subject.lm.unembedding.T
    for latent in (0, 66):
        up, down = found[latent]
        named = torch.tensor([bool(text) for text in vocabulary.texts])
        order = logits[latent].masked_fill(~named, -torch.inf).argsort(descending=True)[:5]
        assert [effect.token_id for effect in up] == order.tolist()
        assert up[0].effect == pytest.approx(float(logits[latent, order[0]]), rel=1e-4)
        assert down[0].effect == pytest.approx(float(logits[latent][named].min()), rel=1e-4)
        assert up[0].token == vocabulary.texts[up[0].token_id]
