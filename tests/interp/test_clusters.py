from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import sparse

from rldecoder.config.interp import ClusterFeaturesConfig
from rldecoder.interp import clusters
from rldecoder.interp.clusters import (
    HeldOutRows,
    fingerprint_cosine,
    fingerprints,
    likeness,
    merge,
    output_jaccard,
)
from rldecoder.sae.model import SparseLatents

if TYPE_CHECKING:
    from rldecoder.interp.importance import PatchBatch, Subject

LIMITS = ClusterFeaturesConfig(label_cosine=1.0, output_jaccard=1.0)


@pytest.fixture
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    dense = rng.uniform(0.1, 2, (5, 400)) * (rng.random((5, 400)) < 0.1)
    dense[1] = dense[0] * 1.5
    dense[4] = 0
    return dense


def test_likeness_equals_naive_formulas(rows: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    directions = rng.normal(size=(5, 8))
    masks: list[np.ndarray | None] = [rng.random(400) < 0.2 for _ in range(5)]
    masks[3] = None
    found = likeness(directions, sparse.csr_array(rows), 400, masks)
    for i in range(5):
        for j in range(5):
            if i == j:
                continue
            a, b = directions[i], directions[j]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found.decoder_cosine[i, j] == pytest.approx(cosine)
            both = ((rows[i] > 0) & (rows[j] > 0)).sum()
            either = ((rows[i] > 0) | (rows[j] > 0)).sum()
            assert found.jaccard[i, j] == pytest.approx(both / max(either, 1))
            if 4 not in (i, j):
                assert found.pearson[i, j] == pytest.approx(np.corrcoef(rows[i], rows[j])[0, 1])
            else:
                assert found.pearson[i, j] == 0
            if 3 in (i, j):
                assert np.isnan(found.label_jaccard[i, j])
            else:
                first, second = masks[i], masks[j]
                assert first is not None
                assert second is not None
                expected = (first & second).sum() / (first | second).sum()
                assert found.label_jaccard[i, j] == pytest.approx(expected)


def test_label_embeddings_share_the_label_vote(rows: np.ndarray) -> None:
    limits = LIMITS.model_copy(update={"label_cosine": 0.95})
    vectors = np.array([[1.0, 0], [0.96, 0.28], [0.6, 0.8], [1, 0], [np.nan, np.nan]])
    mask = np.arange(400) < 50
    labels: list[np.ndarray | None] = [mask, ~mask, None, mask, None]
    found = likeness(np.eye(5), sparse.csr_array(rows), 400, labels, vectors)
    plain = likeness(np.eye(5), sparse.csr_array(rows), 400, labels)
    extra = found.votes(limits) - plain.votes(limits)
    assert found.label_cosine[0, 1] == pytest.approx(0.96)
    assert extra[0, 1] == 1  # in words alone
    assert extra[0, 3] == 0  # predicates said so already: one vote
    assert extra[0, 2] == extra[3, 4] == 0
    assert np.isnan(plain.label_cosine).all()


def test_votes_count_three_kinds(rows: np.ndarray) -> None:
    directions = np.eye(5)
    directions[2] = directions[0]
    mask = np.arange(400) < 50
    labels: list[np.ndarray | None] = [mask, mask, ~mask, None, mask]
    votes = likeness(directions, sparse.csr_array(rows), 400, labels).votes(LIMITS)
    assert votes[0, 1] == 2  # fire together, same label
    assert votes[0, 2] == 1  # same direction only
    assert votes[0, 4] == 1  # same label only
    assert votes[0, 3] == 0
    assert (votes == votes.T).all()


def rows_of(batch: PatchBatch) -> HeldOutRows:
    """The tokens that an activation cache would hold: all but the first of each sequence."""
    seq_id, pos = torch.meshgrid(torch.arange(3), torch.arange(1, 14), indexing="ij")
    acts, indices = batch.latents
    latents = type(batch.latents)(acts[:, 1:].reshape(-1, 8), indices[:, 1:].reshape(-1, 8))
    return HeldOutRows(latents, seq_id.flatten(), pos.flatten())


def test_fingerprint_of_the_linear_decoder_is_its_row(subject: Subject, batch: PatchBatch) -> None:
    rows = rows_of(batch)
    latents = rows.latents
    counts = torch.bincount(latents.indices[latents.acts > 0], minlength=96)
    active = [int(i) for i in counts.argsort(descending=True)[:3]]
    silent = int((counts == 0).nonzero()[0])
    probes = torch.arange(0, 512, 7)
    found = fingerprints(subject.decoder, rows, [*active, silent], probes, max_tokens=1000)
    assert set(found) == set(active)
    for latent in active:
        hits = latents.acts[latents.indices == latent]
        mean = hits[hits > 0].mean()
        effect = -mean * subject.decoder.W[latent] @ subject.lm.unembedding[probes].T
        expected = (effect - effect.mean()).numpy()
        np.testing.assert_allclose(found[latent], expected, atol=1e-4)
    capped = fingerprints(subject.decoder, rows, active[:1], probes, max_tokens=1)
    assert np.abs(capped[active[0]] - found[active[0]]).max() > 1e-6
    # Another size, the same direction: ablation fingerprints compare directions.
    assert fingerprint_cosine(capped[active[0]], found[active[0]]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("at_once", [1, 16])
def test_fingerprint_with_blocks_is_the_change_of_whole_sequences(
    subject_with_blocks: Subject, batch: PatchBatch, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "SEQUENCES_AT_ONCE", at_once)
    decoder, probes = subject_with_blocks.decoder, torch.arange(0, 512, 7)
    acts, indices = batch.latents
    latent = int(indices[0, 5, 0])
    hit = (indices == latent) & (acts > 0)
    before = decoder.hidden(batch.latents)
    after = decoder.hidden(SparseLatents(acts.masked_fill(hit, 0.0), indices))
    effect = (after - before)[hit.any(-1)].mean(0) @ subject_with_blocks.lm.unembedding[probes].T
    found = fingerprints(decoder, rows_of(batch), [latent], probes, max_tokens=1000)
    np.testing.assert_allclose(found[latent], (effect - effect.mean()).numpy(), atol=1e-4)


def test_fingerprint_cosine_is_undefined_without_an_effect() -> None:
    a = np.array([1.0, -1.0])
    assert fingerprint_cosine(a, -a) == pytest.approx(-1.0)
    assert fingerprint_cosine(a, None) is None
    assert fingerprint_cosine(a, a * 0) is None


def test_merge_needs_agreement_with_the_representative_itself() -> None:
    agreeing = {frozenset(pair) for pair in ((1, 2), (2, 3), (5, 1))}
    assert merge([1, 2, 3, 4, 5], agreeing) == {1: [1, 2, 5], 3: [3], 4: [4]}
    assert merge([2, 1, 3, 5], agreeing) == {2: [2, 1, 3], 5: [5]}
    assert merge([1, 2], set()) == {1: [1], 2: [2]}


def test_output_sets_are_a_label_vote() -> None:
    sets = [{1: 3.0, 2: 1.0}, {1: 1.5, 2: 0.5}, {1: 1.0, 9: 3.0}, {}]
    found = output_jaccard(sets)
    assert found[0, 1] == pytest.approx(1)  # gains count by their shares
    assert found[0, 2] == pytest.approx(0.25 / 1.75)
    assert np.isnan(found[3]).all()
    acts = sparse.csr_array(np.eye(4, 8))
    alike = likeness(np.eye(4), acts, 8, [None] * 4, None, sets)
    votes = alike.votes(LIMITS.model_copy(update={"output_jaccard": 0.5}))
    assert (votes[0, 1], votes[0, 2], votes[0, 3]) == (1, 0, 0)
