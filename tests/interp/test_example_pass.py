"""The pass against a dense recomputation on small text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from rldecoder.data.activations import ActivationBatch
from rldecoder.interp import example_pass
from rldecoder.interp.corpus import Firings, TokenGrid
from rldecoder.interp.example_pass import ExamplePass, PassResult, examples_of
from rldecoder.interp.examples import EXAMPLES, ExampleSettings
from rldecoder.sae.model import SparseLatents
from rldecoder.schemas import read_parquet, write_parquet

ROWS, WIDTH, WINDOW, LATENTS, SLOTS = 40, 20, 8, 12, 4
SETTINGS = ExampleSettings(WINDOW, num_top=4, num_quantile=3, num_negative=5)


class World:
    """Text in which each token's latents are drawn at random; latents 10 and 11 are special."""

    def __init__(self, rows: int = ROWS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 30, (rows, WIDTH))
        valid = np.ones((rows, WIDTH), bool)
        valid[:, 0] = False
        valid[rows // 2, 7] = False  # a sink in the middle of a sequence
        self.grid = TokenGrid("label", np.arange(rows) + 100, tokens, valid, tokens * 0)
        row, pos = np.nonzero(valid)
        indices = np.stack([rng.permutation(10)[:SLOTS] for _ in row])
        acts = rng.uniform(0.1, 5, indices.shape) * (rng.random(indices.shape) < 0.3)
        # Latent 10 fires on every token 3 of the first rows only; latent 11 fires everywhere.
        indices[:, 0] = 11
        acts[:, 0] = 1.0
        fires = (tokens[row, pos] == 3) & (row < rows // 2)
        indices[fires, 1], acts[fires, 1] = 10, 2.0
        self.seq, self.pos = torch.from_numpy(row + 100), torch.from_numpy(pos)
        self.ids = torch.from_numpy(tokens[row, pos])
        self.acts = torch.from_numpy(acts.astype(np.float32))
        self.indices = torch.from_numpy(indices)
        self.dense = np.zeros((LATENTS, rows, WIDTH), np.float32)
        for slot in range(SLOTS):
            self.dense[indices[:, slot], row, pos] = np.maximum(
                acts[:, slot].astype(np.float32), self.dense[indices[:, slot], row, pos]
            )

    def run(self, batch: int, latents: Any = None, seed: int = 0) -> PassResult:
        found = ExamplePass(LATENTS, SETTINGS, WIDTH, seed, latents)
        for start in range(0, len(self.seq), batch):
            part = slice(start, start + batch)
            found.add(
                ActivationBatch(self.seq[part], self.pos[part], self.ids[part], None, None),
                SparseLatents(self.acts[part], self.indices[part]),
            )
        return found.finish(self.grid)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def _rows(found: PassResult, **wanted: object) -> list[dict[str, Any]]:
    rows = found.table.to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_examples_show_the_text_and_the_activations_as_they_are(
    world: World, tmp_path: Path
) -> None:
    found = world.run(100)
    rows = _rows(found)
    assert {row["kind"] for row in rows} == {"top", "quantile", "negative", "near_miss"}
    for row in rows:
        at, span = row["seq_id"] - 100, slice(row["start"], row["start"] + len(row["tokens"]))
        assert row["tokens"] == world.grid.tokens[at, span].tolist()
        assert row["acts"] == world.dense[row["latent"], at, span].tolist()
        assert row["start"] <= row["pos"] < row["start"] + len(row["tokens"])
        assert len(row["tokens"]) == min(WINDOW, WIDTH - row["start"])
        assert row["act"] == world.dense[row["latent"], at, row["pos"]]
        assert (row["act"] == 0) == (row["kind"] in ("negative", "near_miss"))
        if row["act"] == 0:
            assert sum(row["acts"]) == 0
    density = (world.dense > 0).sum((1, 2)) / world.grid.valid.sum()
    np.testing.assert_allclose(found.density, density)
    columns = {name: found.table[name] for name in EXAMPLES.names}
    write_parquet(tmp_path / "examples.parquet", columns, EXAMPLES)
    assert read_parquet(tmp_path / "examples.parquet").num_rows == len(rows)


@pytest.mark.parametrize("latent", range(LATENTS))
def test_top_examples_are_the_strongest_windows(world: World, latent: int) -> None:
    found = world.run(100)
    peaks = []
    for start in range(0, WIDTH, WINDOW):
        peaks += world.dense[latent, :, start : start + WINDOW].max(1).tolist()
    strongest = sorted((peak for peak in peaks if peak > 0), reverse=True)
    top = _rows(found, latent=latent, kind="top")
    assert [row["act"] for row in top] == pytest.approx(strongest[:4])
    assert [row["rank"] for row in top] == list(range(len(top)))
    windows = {(row["seq_id"], row["pos"] // WINDOW) for row in top}
    assert len(windows) == len(top)
    quantile = _rows(found, latent=latent, kind="quantile")
    assert len(quantile) == min(3, len(strongest) - len(top))
    assert not windows & {(row["seq_id"], row["pos"] // WINDOW) for row in quantile}
    # Few enough windows that all peaks are in the sample: one from each third of the rest.
    rest = np.array_split(strongest[4:], 3)
    if len(strongest) <= example_pass.SAMPLE:
        for row, part in zip(quantile, rest, strict=False):
            assert part.min() - 1e-6 <= row["act"] <= part.max() + 1e-6


def test_near_misses_hold_tokens_that_it_fires_on(world: World) -> None:
    found = world.run(100)
    near = _rows(found, latent=10, kind="near_miss")
    assert len(near) == 5
    for row in near:
        assert row["seq_id"] >= 100 + ROWS // 2
        assert 3 in row["tokens"]
    # A latent that fires everywhere has no quiet window.
    assert _rows(found, latent=11, kind="negative") == []
    assert _rows(found, latent=11, kind="near_miss") == []


@pytest.mark.parametrize("batch", [7, 19, 333, 10**6])
def test_batches_do_not_change_the_result(
    world: World, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = world.run(100)
    found = world.run(batch)
    assert found.table == expected.table
    monkeypatch.setattr(example_pass, "DENSE_VALUES", 1)
    assert world.run(batch).table == expected.table
    assert world.run(batch, seed=1).table != expected.table


def test_some_latents_in_the_order_asked_for(world: World) -> None:
    found = world.run(100, np.array([5, 2]))
    assert list(dict.fromkeys(found.table["latent"].to_pylist())) == [5, 2]
    everything = world.run(100)
    assert _rows(found, latent=2, kind="top") == _rows(everything, latent=2, kind="top")
    assert found.density.tolist() == everything.density[[5, 2]].tolist()
    # Nothing is kept of the others.
    few = ExamplePass(LATENTS, SETTINGS, WIDTH, 0, np.array([5, 2]))
    assert len(few.top.key) == len(few.sample.key) == few.fires.shape[1] == len(few.count) == 2


def test_samples_are_uniform_and_memory_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_pass, "WINDOWS", 16)
    monkeypatch.setattr(example_pass, "SAMPLE", 8)
    world = World(rows=400)
    found = ExamplePass(LATENTS, SETTINGS, WIDTH, 0)
    sizes = set()
    for start in range(0, len(world.seq), 1000):
        part = slice(start, start + 1000)
        found.add(
            ActivationBatch(world.seq[part], world.pos[part], world.ids[part], None, None),
            SparseLatents(world.acts[part], world.indices[part]),
        )
        waiting = sum(len(rows[0]) for rows in found._waiting)
        assert waiting <= WIDTH
        sizes.add((found.sample.around.nbytes, found.top.around.nbytes, found.fires.nbytes))
    assert len(sizes) == 1
    # Latent 11 fires in every window: its sample lies anywhere in the text.
    draws = []
    small = World(rows=60)
    for seed in range(40):
        sample = small.run(1000, np.array([11]), seed)
        draws += [row["seq_id"] for row in _rows(sample, kind="quantile")]
    assert len(draws) == 120
    assert 120 < np.mean(draws) < 140
    assert len(set(draws)) > 30


def test_known_firings_give_the_same_examples() -> None:
    world = World()
    kept = np.array([11, 3, 10])
    flat = world.dense.reshape(LATENTS, -1)
    firings = Firings(kept, sparse.csr_array(flat[kept] * world.grid.valid.reshape(-1)))
    found = examples_of(world.grid, firings, SETTINGS, seed=0)
    assert found.schema == EXAMPLES
    assert set(found["latent"].to_pylist()) == set(kept.tolist())

    def strongest(table: Any) -> list[tuple[int, int, int]]:
        return [
            (row["latent"], row["seq_id"], row["pos"])
            for row in table.to_pylist()
            if row["kind"] == "top" and row["latent"] != 11  # whose activations are all alike
        ]

    assert strongest(found) == strongest(world.run(64, kept).table)
    for row in found.to_pylist():
        cells = flat[row["latent"]].reshape(world.grid.tokens.shape)[row["seq_id"] - 100]
        shown = cells[row["start"] : row["start"] + len(row["acts"])]
        if row["kind"] in ("negative", "near_miss"):
            assert not shown.any()
        else:
            np.testing.assert_array_equal(row["acts"], shown)
