"""Every architecture against a textbook version in dense torch: values, gradients, choices."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from rldecoder.config.sae import TrainSaeConfig
from rldecoder.sae.architectures import (
    ARCHITECTURES,
    DENSE_ABOVE,
    Architecture,
    BatchTopK,
    JumpRelu,
)
from rldecoder.sae.autoencode import Autoencoded, autoencode, autoencode_dense
from rldecoder.sae.sparse_ops import SaeWeights
from rldecoder.sae.spec import SaeSpec

D_MODEL, NUM_LATENTS, NUM_TOKENS = 24, 320, 50


def architecture(
    name: str, d_model: int = D_MODEL, num_latents: int = NUM_LATENTS, **settings: Any
) -> Architecture:
    """In training, over float32 products unless the settings say otherwise."""
    config = TrainSaeConfig(architecture=name, **({"k": 8, "matmul_dtype": "float32"} | settings))  # type: ignore[arg-type]
    kind = ARCHITECTURES[name]
    k = config.k if kind.read_as == "topk" else None
    spec = SaeSpec(architecture=kind.read_as, d_model=d_model, num_latents=num_latents, k=k)
    return kind(config, spec)


TOPK, WIDE = {"name": "topk"}, {"name": "topk", "k": 64}
BATCH = {"name": "batchtopk"}
MATRYOSHKA = {"name": "matryoshka", "matryoshka_prefixes": (1 / 16, 1 / 4, 1.0)}
JUMP = {"name": "jumprelu", "bandwidth": 0.3 / D_MODEL**0.5}
RELU = {"name": "relu"}
SETTINGS = [TOPK, WIDE, BATCH, MATRYOSHKA, JUMP, RELU]
NAMES = [f"{settings['name']}-{settings.get('k', 8)}" for settings in SETTINGS]


def test_every_architecture_of_the_config_has_its_class() -> None:
    names = get_args(TrainSaeConfig.model_fields["architecture"].annotation)
    assert set(ARCHITECTURES) == set(names)


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


def setting(settings: dict[str, Any]) -> tuple[SaeWeights, Tensor, Architecture]:
    """Weights and inputs with which the sparse path is taken."""
    x = torch.randn(NUM_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1))
    made = architecture(**settings)
    if isinstance(made, JumpRelu):
        spread = torch.rand(NUM_LATENTS, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            made.log_threshold.copy_((3.2 + spread).log())
    return make_weights(-3.5 if settings is RELU else 0.0), x, made


def textbook(x: Tensor, weights: SaeWeights, made: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, dense activations and gates, sharing nothing with our functions."""
    name, k = made.config.architecture, made.config.k
    pre_acts = (x - weights.b_dec) @ weights.enc.T + weights.b_enc
    kept = torch.ones_like(pre_acts)
    if name == "topk":
        kept = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(k).indices, 1.0)
    elif name in ("batchtopk", "matryoshka"):
        smallest = pre_acts.detach().flatten().sort(descending=True).values[k * len(x) - 1]
        kept = (pre_acts >= smallest).float()
    if not isinstance(made, JumpRelu):
        acts = torch.relu(pre_acts) * kept
        gates = (acts.detach() > 0).float()
    else:
        # The straight-through gradients as plain autograd: value of the step, gradient of a ramp.
        theta = made.log_threshold.exp()
        ramp = (theta - pre_acts.detach()) / 0.3
        ramp = torch.where(ramp.detach().abs() < 0.5, ramp, ramp.detach())
        gates = (pre_acts.detach() > theta.detach()).float() + ramp.detach() - ramp
        acts = pre_acts * gates.detach() + theta.detach() * (gates - gates.detach())
    ends = (20, 80, 320) if name == "matryoshka" else (NUM_LATENTS,)
    levels = [acts[:, :end] @ weights.dec[:end] + weights.b_dec for end in ends]
    return torch.stack(levels, 1), acts, gates


@pytest.mark.parametrize(
    ("function", "settings"),
    [*(("sparse", settings) for settings in SETTINGS), ("dense", JUMP), ("dense", RELU)],
    ids=[*(f"sparse-{name}" for name in NAMES), "dense-jumprelu", "dense-relu"],
)
def test_values_and_gradients_equal_the_textbooks(function: str, settings: dict[str, Any]) -> None:
    weights, x, made = setting(settings)
    levels, acts, gates = textbook(x, weights, made)
    if function == "sparse":
        out = autoencode(x, weights, made)
        assert out.acts.dim() == 1, "the sparse path must be taken"
        assert len(out.acts) < DENSE_ABOVE * acts.numel() or settings is WIDE
    else:
        out = autoencode_dense(x, weights, made)
    torch.testing.assert_close(out.levels, levels, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.fired, (gates.detach() > 0).any(0))
    assert float(out.gates.detach().sum()) == float(gates.detach().sum())

    wanted = [*weights, *made.parameters]

    def gradients(levels: Tensor, acts: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
        loss = (levels - x[:, None]).square().mean() + 0.3 * acts.square().sum() / len(x)
        if made.parameters:
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
    out = autoencode(x, weights, architecture("topk", 6, 40_960, k=16))
    torch.testing.assert_close(out.levels[:, 0], recon, rtol=1e-5, atol=1e-4)
    got = torch.autograd.grad((out.levels[:, 0] - x).square().mean(), list(weights))
    want = torch.autograd.grad((recon - x).square().mean(), list(weights))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_cuda_gives_the_textbooks_values_and_gradients(settings: dict[str, Any]) -> None:
    weights, x, made = setting(settings)
    levels, *_ = textbook(x, weights, made)
    want = torch.autograd.grad((levels - x[:, None]).square().mean(), list(weights))
    there = SaeWeights(*(nn.Parameter(tensor.detach().cuda()) for tensor in weights))
    if isinstance(made, JumpRelu):
        made.log_threshold.data = made.log_threshold.data.cuda()
    out = autoencode(x.cuda(), there, made)
    torch.testing.assert_close(out.levels.cpu(), levels, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad((out.levels - x.cuda()[:, None]).square().mean(), list(there))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [RELU, JUMP], ids=["relu", "jumprelu"])
def test_many_actives_take_the_dense_path(settings: dict[str, Any]) -> None:
    weights, x, made = make_weights(), torch.randn(NUM_TOKENS, D_MODEL), architecture(**settings)
    if isinstance(made, JumpRelu):
        made.log_threshold.data.fill_(-3.0)
    out = autoencode(x, weights, made)
    assert out.acts.shape == (NUM_TOKENS, NUM_LATENTS)
    torch.testing.assert_close(out.levels, textbook(x, weights, made)[0])


def test_tokens_on_which_nothing_fires_get_the_mean() -> None:
    weights, x = make_weights(-4.0), torch.randn(NUM_TOKENS, D_MODEL)
    made = architecture("relu")
    silent = textbook(x, weights, made)[1].sum(1) == 0
    assert bool(silent.any())
    assert not bool(silent.all())
    recon = autoencode(x, weights, made).levels[:, 0]
    assert torch.equal(recon[silent], weights.b_dec.expand_as(recon[silent]))


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_bfloat16_changes_little(name: str) -> None:
    """A low-precision product changes the choice a little, and the values hardly."""
    weights, x = make_weights(), torch.randn(NUM_TOKENS, D_MODEL)
    short = architecture(name)
    short.matmul_dtype = torch.bfloat16
    exact, out = autoencode(x, weights, architecture(name)), autoencode(x, weights, short)
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
    made = architecture("batchtopk")
    assert isinstance(made, BatchTopK)
    made.matmul_dtype = dtype
    want = autoencode(x, weights, made)
    made.floor = floor
    got = autoencode(x, weights, made)
    assert want.cut == got.cut > 0
    for one, other in zip(gathered(want), gathered(got), strict=True):
        assert torch.equal(one, other)


def test_the_cut_of_a_batch_that_hardly_fires_is_zero() -> None:
    out = autoencode(torch.randn(4, D_MODEL), make_weights(-9.0), architecture("batchtopk"))
    assert out.cut == 0
    assert not bool(out.fired.any())
