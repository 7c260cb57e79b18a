"""Sparse products and their gradients against dense autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rldecoder.sae.sparse_ops import (
    DENSE_ABOVE,
    Autoencoded,
    SaeWeights,
    SparseLatents,
    autoencode,
    autoencode_dense,
    decode_sparse,
    sparsify,
    top_k,
)

D_MODEL, NUM_LATENTS, NUM_TOKENS = 24, 320, 50


def make_weights(bias: float, seed: int = 0) -> SaeWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return SaeWeights(
        nn.Parameter(draw(NUM_LATENTS, D_MODEL) / D_MODEL**0.5),
        nn.Parameter(draw(NUM_LATENTS) * 0.1 + bias),
        nn.Parameter(draw(NUM_LATENTS, D_MODEL) / D_MODEL**0.5),
        nn.Parameter(draw(D_MODEL)),
    )


def textbook(x: Tensor, weights: SaeWeights, k: int | None) -> tuple[Tensor, Tensor]:
    """Reconstruction and dense activations in plain torch, sharing nothing with our functions."""
    pre_acts = (x - weights.b_dec) @ weights.enc.T + weights.b_enc
    acts = torch.relu(pre_acts)
    if k is not None:
        kept = torch.zeros_like(acts).scatter(1, pre_acts.topk(k).indices, 1.0)
        acts = acts * kept
    return acts @ weights.dec + weights.b_dec, acts


def gradients(recon: Tensor, acts_sum: Tensor, x: Tensor, weights: SaeWeights) -> list[Tensor]:
    loss = (recon - x).square().mean() + 0.3 * acts_sum / len(x)
    return list(torch.autograd.grad(loss, list(weights)))


@pytest.mark.parametrize("function", ["sparse", "dense"])
@pytest.mark.parametrize("k", [8, 64, None])
def test_gradients_equal_dense_autograd(function: str, k: int | None) -> None:
    bias = 0.0 if k is not None else -3.5
    weights, x = make_weights(bias), torch.randn(NUM_TOKENS, D_MODEL)
    want_recon, want_acts = textbook(x, weights, k)
    share = float((want_acts > 0).float().mean())
    if k is None:
        assert 0 < share < DENSE_ABOVE, "the relu case must take the sparse path"
    out: Autoencoded = (
        autoencode(x, weights, k) if function == "sparse" else autoencode_dense(x, weights, k)
    )
    torch.testing.assert_close(out.recon, want_recon, rtol=1e-5, atol=1e-5)
    got = gradients(out.recon, out.pairs.acts.square().sum(), x, weights)
    want = gradients(want_recon, want_acts.square().sum(), x, weights)
    for name, one, other in zip(SaeWeights._fields, got, want, strict=True):
        scale = float(other.abs().max())
        assert float((one - other).abs().max()) <= 1e-5 * max(scale, 1e-3), name


def test_relu_with_many_actives_takes_the_dense_path() -> None:
    weights, x = make_weights(0.0), torch.randn(NUM_TOKENS, D_MODEL)
    recon, acts = textbook(x, weights, None)
    out = autoencode(x, weights, None)
    torch.testing.assert_close(out.recon, recon)
    assert len(out.pairs.acts) == int((acts > 0).sum())
    assert out.recon.grad_fn is not None
    assert "AutoencodePairs" not in type(out.recon.grad_fn).__name__


def test_pairs_list_every_token_in_turn() -> None:
    """Includes tokens on which nothing fires: their bag is empty and their recon is b_dec."""
    weights, x = make_weights(-5.5), torch.randn(NUM_TOKENS, D_MODEL)
    _, acts = textbook(x, weights, None)
    silent = acts.sum(1) == 0
    assert bool(silent.any())
    assert not bool(silent.all())
    out = autoencode(x, weights, None)
    ends = [*out.pairs.offsets.tolist()[1:], len(out.pairs.acts)]
    for token, (start, end) in enumerate(zip(out.pairs.offsets.tolist(), ends, strict=True)):
        assert out.pairs.latents[start:end].tolist() == acts[token].nonzero().flatten().tolist()
    assert torch.equal(out.recon[silent], weights.b_dec.expand_as(out.recon[silent]))


def test_bfloat16_only_chooses() -> None:
    """With a low-precision product the values of the chosen latents stay exact."""
    weights, x = make_weights(0.0), torch.randn(NUM_TOKENS, D_MODEL)
    out = autoencode(x, weights, 8, torch.bfloat16)
    pre_acts = (x - weights.b_dec) @ weights.enc.T + weights.b_enc
    chosen = out.pairs.latents.view(NUM_TOKENS, 8)
    want = torch.relu(pre_acts.gather(1, chosen))
    torch.testing.assert_close(out.pairs.acts.view(NUM_TOKENS, 8), want, rtol=1e-5, atol=1e-5)
    exact = pre_acts.topk(8).indices
    shared = sum(len({*a} & {*b}) for a, b in zip(chosen.tolist(), exact.tolist(), strict=True))
    assert shared >= 0.97 * exact.numel()


@given(st.sampled_from([1, 7, 64, 90, 320, 576]), st.integers(1, 64), st.integers(0, 10_000))
def test_grouped_top_k_is_exact(num_latents: int, k: int, seed: int) -> None:
    k = min(k, num_latents)
    values = torch.randn(3, 5, num_latents, generator=torch.Generator().manual_seed(seed))
    latents = top_k(values, k)
    assert latents.indices.shape == (3, 5, k)
    assert torch.equal(torch.relu(values.gather(-1, latents.indices)), latents.acts)
    want = torch.relu(values.topk(k).values)
    assert torch.equal(latents.acts.sort(-1, descending=True).values, want)


def test_top_k_of_ties_names_distinct_latents() -> None:
    latents = top_k(torch.zeros(4, 640), 16)
    assert all(len(set(row)) == 16 for row in latents.indices.tolist())


@given(st.integers(0, 10_000), st.floats(-1, 3))
def test_sparsify_loses_nothing(seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.relu(torch.randn(6, 30, generator=generator) - shift)
    latents = sparsify(dense)
    assert latents.acts.shape[1] == max(1, int((dense > 0).sum(1).max()))
    assert torch.equal(torch.zeros_like(dense).scatter_add(1, *reversed(latents)), dense)


def test_decode_gradients() -> None:
    """Through acts and through the decoder's rows, for latents of any leading shape."""
    weights = make_weights(0.0)
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
