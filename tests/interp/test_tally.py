from __future__ import annotations

import numpy as np
import pytest
import torch

from rldecoder.interp.importance import Attribution, PatchBatch
from rldecoder.interp.tally import MASS_KS, Tally, TargetMass, sequences_of
from rldecoder.sae.model import SparseLatents

L, B, T, K = 30, 6, 5, 12


def _random_case() -> tuple[PatchBatch, Attribution, torch.Tensor]:
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(L)[:K] for _ in range(B * T)]).reshape(B, T, K)
    acts = torch.rand(B, T, K)
    acts[:, :, -1] = 0
    batch = PatchBatch(
        SparseLatents(acts, indices),
        torch.zeros(B, T, 3),
        torch.zeros(B, T, dtype=torch.long),
        torch.ones(B, T, dtype=torch.bool),
    )
    found = Attribution(torch.randn(B, T, K) * (acts > 0), torch.randn(B, T), torch.zeros(B * T))
    considered = torch.rand(B, T) > 0.3
    return batch, found, considered


def fill(tally: Tally, batch: PatchBatch, found: Attribution, considered: torch.Tensor) -> None:
    for sequence in sequences_of(batch, found, considered):
        tally.add(sequence)


def test_columns_equal_a_naive_sum() -> None:
    batch, found, considered = _random_case()
    tally = Tally(L)
    fill(tally, batch, found, considered)
    absolute, signed, count = np.zeros(L), np.zeros(L), np.zeros(L, int)
    for b, t in considered.nonzero().tolist():
        for k in range(K):
            latent = int(batch.latents.indices[b, t, k])
            absolute[latent] += abs(float(found.latents[b, t, k]))
            signed[latent] += float(found.latents[b, t, k])
            count[latent] += float(batch.latents.acts[b, t, k]) > 0
    columns, positions = tally.columns(), int(considered.sum())
    latent = columns["latent"]
    assert latent == np.flatnonzero(count).tolist()
    np.testing.assert_allclose(columns["importance"], absolute[latent] / positions)
    np.testing.assert_allclose(columns["signed"], signed[latent] / positions)
    assert columns["count"] == count[latent].tolist()


def test_mass_has_the_error_term_in_its_denominator() -> None:
    batch, found, considered = _random_case()
    tally = Tally(L)
    fill(tally, batch, found, considered)
    mass = tally.mass()
    shares: dict[int, list[float]] = {k: [] for k in MASS_KS}
    absolute, error = np.zeros(L), 0.0
    for b, t in considered.nonzero().tolist():
        values = np.sort(np.abs(found.latents[b, t].numpy()))[::-1]
        here = abs(float(found.error[b, t]))
        error += here
        for k in MASS_KS:
            shares[k].append(values[:k].sum() / (values.sum() + here))
        np.add.at(
            absolute, batch.latents.indices[b, t].numpy(), np.abs(found.latents[b, t].numpy())
        )
    total = absolute.sum() + error
    for k in MASS_KS:
        entry = mass.top_k[k]
        assert entry.per_position.value == pytest.approx(np.mean(shares[k]))
        assert entry.overall.value == pytest.approx(np.sort(absolute)[::-1][:k].sum() / total)
        for kind in (entry.per_position, entry.overall):
            assert kind.low <= kind.value <= kind.high
    assert mass.error_share.value == pytest.approx(error / total)
    without = found._replace(error=torch.zeros(B, T))
    other = Tally(L)
    fill(other, batch, without, considered)
    assert other.mass().top_k[50].per_position.value == pytest.approx(1.0)
    assert mass.top_k[50].per_position.value < 0.95


def test_an_empty_tally_says_so() -> None:
    mass = Tally(L).mass()
    assert mass == TargetMass(num_positions=0, top_k=None, error_share=None)


def test_block_interval_covers_the_value_of_equal_blocks() -> None:
    batch, found, considered = _random_case()
    tally = Tally(L)
    for _ in range(40):
        fill(tally, batch, found, considered)
    entry = tally.mass().top_k[10].overall
    assert entry.low <= entry.value <= entry.high
    assert entry.high - entry.low < 0.1
