"""Both ways to find the largest give what a plain topk gives, ties and short formats included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rldecoder.sae import selection
from rldecoder.sae.selection import SparseLatents, cells_of, join_latents, top_k


@pytest.fixture(params=["numpy", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way, whatever this machine would choose."""
    monkeypatch.setattr(selection, "_by_short_keys", lambda values: request.param == "numpy")
    return str(request.param)


SHAPES = [(1, 1), (7, 7), (64, 1), (64, 64), (90, 8), (320, 64), (576, 5), (5760, 64)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("num_latents", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_the_largest_are_found(num_latents: int, k: int, dtype: torch.dtype, shift: float) -> None:
    """In either direction of the sign; the fast way must also cut ties down to k."""
    generator = torch.Generator().manual_seed(num_latents + k)
    values = (torch.randn(3, 300, num_latents, generator=generator) + shift).to(dtype)
    latents = top_k(values, k)
    assert latents.indices.shape == (3, 300, k)
    assert torch.equal(torch.relu(values.gather(-1, latents.indices)), latents.acts)
    want = torch.relu(values.topk(k).values)
    assert torch.equal(latents.acts.sort(-1, descending=True).values, want)
    rows = latents.indices.view(-1, k).sort(-1).values
    assert bool((rows[:, 1:] > rows[:, :-1]).all()), "a latent is named twice"


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_many_equal_values(k: int, seed: int) -> None:
    """Few distinct values: the k-th is tied with many, in float32 by its upper half only."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 4, (9, 40), generator=generator).float()
    fine = coarse + 1e-5 * torch.randint(0, 3, (9, 40), generator=generator)
    for values in (coarse, fine, coarse.bfloat16()):
        got = selection._top_k_by_short_keys(values, k)
        assert torch.equal(
            values.gather(1, got).sort(1, descending=True).values, values.topk(k).values
        )
        assert all(len(set(row)) == k for row in got.tolist())


@pytest.mark.usefixtures("way")
def test_no_tokens_no_latents() -> None:
    assert top_k(torch.zeros(2, 0, 10), 3).indices.shape == (2, 0, 3)


@pytest.mark.usefixtures("way")
def test_the_gradient_goes_to_what_was_chosen() -> None:
    values = torch.randn(20, 50, requires_grad=True)
    chosen = top_k(values, 4)
    (gradient,) = torch.autograd.grad(chosen.acts.sum(), values)
    assert torch.equal(gradient.nonzero()[:, 1].view(20, 4), chosen.indices.sort(1).values)


@given(st.integers(0, 700), st.integers(1, 9), st.floats(0, 1))
def test_cells_are_the_masks(rows: int, columns: int, share: float) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) < share
    latents, counts = cells_of(mask)
    assert torch.equal(latents, mask.nonzero(as_tuple=True)[1])
    assert torch.equal(counts, mask.sum(1))


def test_batches_of_different_width_are_padded_with_inactive_latents() -> None:
    narrow = SparseLatents(torch.ones(2, 1), torch.full((2, 1), 5))
    wide = SparseLatents(torch.full((1, 3), 2.0), torch.full((1, 3), 6))
    joined = join_latents([narrow, wide])
    assert joined.acts.tolist() == [[1, 0, 0], [1, 0, 0], [2, 2, 2]]
    assert joined.indices.shape == (3, 3)
