"""Every architecture against a textbook version in dense torch: values, gradients, choices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rldecoder.sae.architectures import (
    DENSE_ABOVE,
    Autoencoded,
    Rule,
    autoencode,
    autoencode_dense,
)
from rldecoder.sae.sparse_ops import SaeWeights

D_MODEL, NUM_LATENTS, NUM_TOKENS = 24, 320, 50
TOPK, BATCH = Rule("topk", 8), Rule("batchtopk", 8)
MATRYOSHKA = Rule("matryoshka", 8, (20, 80, 320))
JUMP, RELU = Rule("jumprelu", bandwidth=0.3), Rule("relu")
RULES = [TOPK, Rule("topk", 64), BATCH, MATRYOSHKA, JUMP, RELU]


def make_weights(bias: float = 0.0, seed: int = 0) -> SaeWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return SaeWeights(
        nn.Parameter(draw(NUM_LATENTS, D_MODEL) / D_MODEL**0.5),
        nn.Parameter(draw(NUM_LATENTS) * 0.1 + bias),
        nn.Parameter(draw(NUM_LATENTS, D_MODEL) / D_MODEL**0.5),
        nn.Parameter(draw(D_MODEL)),
    )


def setting(rule: Rule) -> tuple[SaeWeights, Tensor, nn.Parameter | None]:
    """Weights and inputs with which the sparse path is taken."""
    x = torch.randn(NUM_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1))
    threshold = None
    if rule is JUMP:
        spread = torch.rand(NUM_LATENTS, generator=torch.Generator().manual_seed(2))
        threshold = nn.Parameter((3.2 + spread).log())
    return make_weights(-3.5 if rule is RELU else 0.0), x, threshold


def textbook(
    x: Tensor, weights: SaeWeights, rule: Rule, log_threshold: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, dense activations and gates, sharing nothing with our functions."""
    pre_acts = (x - weights.b_dec) @ weights.enc.T + weights.b_enc
    kept = torch.ones_like(pre_acts)
    if rule.architecture == "topk":
        kept = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(rule.k).indices, 1.0)
    elif rule.k:
        smallest = pre_acts.detach().flatten().sort(descending=True).values[rule.k * len(x) - 1]
        kept = (pre_acts >= smallest).float()
    if log_threshold is None:
        acts = torch.relu(pre_acts) * kept
        gates = (acts.detach() > 0).float()
    else:
        # The straight-through gradients as plain autograd: value of the step, gradient of a ramp.
        theta, width = log_threshold.exp(), rule.bandwidth
        ramp = (theta - pre_acts.detach()) / width
        ramp = torch.where(ramp.detach().abs() < 0.5, ramp, ramp.detach())
        gates = (pre_acts.detach() > theta.detach()).float() + ramp.detach() - ramp
        acts = pre_acts * gates.detach() + theta.detach() * (gates - gates.detach())
    ends = rule.prefixes or (NUM_LATENTS,)
    levels = [acts[:, :end] @ weights.dec[:end] + weights.b_dec for end in ends]
    return torch.stack(levels, 1), acts, gates


@pytest.mark.parametrize("function", ["sparse", "dense"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.architecture}-{rule.k}")
def test_values_and_gradients_equal_the_textbooks(function: str, rule: Rule) -> None:
    weights, x, log_threshold = setting(rule)
    levels, acts, gates = textbook(x, weights, rule, log_threshold)
    if function == "sparse":
        out = autoencode(x, weights, rule, log_threshold)
        assert out.acts.dim() == 1, "the sparse path must be taken"
        assert len(out.acts) < DENSE_ABOVE * acts.numel() or rule.k == 64
    else:
        out = autoencode_dense(x, weights, rule, log_threshold)
    torch.testing.assert_close(out.levels, levels, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.fired, (gates.detach() > 0).any(0))
    assert float(out.gates.detach().sum()) == float(gates.detach().sum())

    wanted = [*weights, *([] if log_threshold is None else [log_threshold])]

    def gradients(levels: Tensor, acts: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
        loss = (levels - x[:, None]).square().mean() + 0.3 * acts.square().sum() / len(x)
        if log_threshold is not None:
            loss = loss + 0.1 * gates.sum() / len(x)
        return torch.autograd.grad(loss, wanted)

    got, want = gradients(out.levels, out.acts, out.gates), gradients(levels, acts, gates)
    for name, one, other in zip([*SaeWeights._fields, "threshold"], got, want, strict=False):
        scale = float(other.abs().max())
        assert scale > 0, name
        assert float((one - other).abs().max()) <= 1e-5 * max(scale, 1e-3), name


def test_more_latents_than_short_keys_can_count() -> None:
    """40,960, the plan's number; up to 32,768 pairs are sorted by 16-bit keys."""
    draw = torch.Generator().manual_seed(3)
    weights = SaeWeights(
        *(
            nn.Parameter(torch.randn(shape, generator=draw))
            for shape in ((40_960, 6), (40_960,), (40_960, 6), (6,))
        )
    )
    x = torch.randn(40, 6, generator=draw)
    kept = weights.b_enc + (x - weights.b_dec) @ weights.enc.T
    best = kept.topk(16)
    assert int(best.indices.max()) >= 1 << 15, "latents beyond the short keys must fire"
    acts = torch.zeros_like(kept).scatter(1, best.indices, best.values.relu())
    recon = acts @ weights.dec + weights.b_dec
    out = autoencode(x, weights, Rule("topk", 16))
    torch.testing.assert_close(out.levels[:, 0], recon, rtol=1e-5, atol=1e-4)
    got = torch.autograd.grad((out.levels[:, 0] - x).square().mean(), list(weights))
    want = torch.autograd.grad((recon - x).square().mean(), list(weights))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.architecture}-{rule.k}")
def test_cuda_gives_the_textbooks_values_and_gradients(rule: Rule) -> None:
    weights, x, log_threshold = setting(rule)
    levels, *_ = textbook(x, weights, rule, log_threshold)
    want = torch.autograd.grad((levels - x[:, None]).square().mean(), list(weights))
    there = SaeWeights(*(nn.Parameter(tensor.detach().cuda()) for tensor in weights))
    moved = None if log_threshold is None else nn.Parameter(log_threshold.detach().cuda())
    out = autoencode(x.cuda(), there, rule, moved)
    torch.testing.assert_close(out.levels.cpu(), levels, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad((out.levels - x.cuda()[:, None]).square().mean(), list(there))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", [RELU, JUMP])
def test_many_actives_take_the_dense_path(rule: Rule) -> None:
    weights, x = make_weights(), torch.randn(NUM_TOKENS, D_MODEL)
    log_threshold = torch.full((NUM_LATENTS,), -3.0) if rule is JUMP else None
    out = autoencode(x, weights, rule, log_threshold)
    assert out.acts.shape == (NUM_TOKENS, NUM_LATENTS)
    torch.testing.assert_close(out.levels, textbook(x, weights, rule, log_threshold)[0])


def test_tokens_on_which_nothing_fires_get_the_mean() -> None:
    weights, x = make_weights(-4.0), torch.randn(NUM_TOKENS, D_MODEL)
    silent = textbook(x, weights, RELU, None)[1].sum(1) == 0
    assert bool(silent.any())
    assert not bool(silent.all())
    recon = autoencode(x, weights, RELU).levels[:, 0]
    assert torch.equal(recon[silent], weights.b_dec.expand_as(recon[silent]))


@pytest.mark.parametrize("rule", [TOPK, BATCH], ids=["topk", "batchtopk"])
def test_bfloat16_changes_little(rule: Rule) -> None:
    """A low-precision product changes the choice a little, and the values hardly."""
    weights, x = make_weights(), torch.randn(NUM_TOKENS, D_MODEL)
    exact, out = autoencode(x, weights, rule), autoencode(x, weights, rule, None, torch.bfloat16)
    assert len(out.acts) == len(exact.acts) == 8 * NUM_TOKENS
    exact_sums, sums = exact.acts.detach().sort().values, out.acts.detach().sort().values
    assert float((exact_sums - sums).abs().mean()) < 0.01
    assert float((out.fired == exact.fired).float().mean()) > 0.97


def gathered(out: Autoencoded) -> list[Tensor]:
    return [out.levels, out.acts, out.fired]


@pytest.mark.parametrize("floor", [-math.inf, 0.0, 1.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_is_only_a_hint(floor: float, dtype: torch.dtype) -> None:
    """Below the cut or far above it: the same pairs, so that a resumed run takes the same steps."""
    weights, x = make_weights(), torch.randn(NUM_TOKENS, D_MODEL)
    want = autoencode(x, weights, BATCH, None, dtype)
    got = autoencode(x, weights, BATCH, None, dtype, floor=floor)
    assert want.cut == got.cut > 0
    for one, other in zip(gathered(want), gathered(got), strict=True):
        assert torch.equal(one, other)


def test_the_cut_of_a_batch_that_hardly_fires_is_zero() -> None:
    out = autoencode(torch.randn(4, D_MODEL), make_weights(-9.0), BATCH)
    assert out.cut == 0
    assert not bool(out.fired.any())
