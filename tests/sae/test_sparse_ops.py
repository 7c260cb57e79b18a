"""Selections and sparse products against plain torch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rldecoder.sae.selection import SparseLatents
from rldecoder.sae.sparse_ops import (
    Pairs,
    SaeWeights,
    bags_of,
    decode_sparse,
    sparsify,
)

D_MODEL, NUM_LATENTS = 24, 320


def make_weights(seed: int = 0) -> SaeWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return SaeWeights(
        nn.Parameter(draw(NUM_LATENTS, D_MODEL) / D_MODEL**0.5),
        nn.Parameter(draw(NUM_LATENTS) * 0.1),
        nn.Parameter(draw(NUM_LATENTS, D_MODEL) / D_MODEL**0.5),
        nn.Parameter(draw(D_MODEL)),
    )


@given(st.integers(0, 10_000), st.floats(-1, 3))
def test_sparsify_loses_nothing(seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.relu(torch.randn(6, 30, generator=generator) - shift)
    latents = sparsify(dense)
    assert latents.acts.shape[1] == max(1, int((dense > 0).sum(1).max()))
    assert torch.equal(torch.zeros_like(dense).scatter_add(1, *reversed(latents)), dense)


def test_decode_gradients() -> None:
    """Through acts and through the decoder's rows, for latents of any leading shape."""
    weights = make_weights()
    acts = torch.rand(2, 5, 7, requires_grad=True)
    indices = torch.randint(0, NUM_LATENTS, (2, 5, 7))
    got = decode_sparse(SparseLatents(acts, indices), weights.dec, weights.b_dec)
    want = torch.einsum("btk,btkd->btd", acts, F.embedding(indices, weights.dec)) + weights.b_dec
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, (acts, weights.dec), upstream),
        torch.autograd.grad(want, (acts, weights.dec), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@given(st.integers(0, 10_000), st.floats(0, 2))
def test_pairs_are_the_masks_cells(seed: int, cut: float) -> None:
    """Tokens without a pair included; a subset of pairs is the pairs of the smaller mask."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(7, 11, generator=generator)
    mask = values > cut
    pairs = Pairs.of_mask(mask)
    rows, columns = mask.nonzero(as_tuple=True)
    assert torch.equal(pairs.tokens, rows)
    assert torch.equal(pairs.latents, columns)
    fewer = pairs.subset(values[rows, columns] > cut + 0.5)
    other = Pairs.of_mask(values > cut + 0.5)
    assert torch.equal(fewer.latents, other.latents)
    assert torch.equal(fewer.offsets, other.offsets)
    order, offsets = pairs.by_latent
    assert torch.equal(pairs.latents[order], columns.sort(stable=True).values)
    assert offsets.tolist() == [int((columns < latent).sum()) for latent in range(11)]


def test_bags_split_tokens_by_groups_of_latents() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    bags = bags_of(Pairs.of_mask(mask), (1, 3, 4))
    assert bags.of_pair.tolist() == [0, 1, 2, 7, 8]
    assert bags.offsets.tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 4]
