"""Benchmarks of labels and rankings, on a decoder small enough to know the answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.decoder.places import Places
from rldecoder.explain.interpretability import (
    DELETION_KS,
    deletion_benchmark,
    deletion_scores,
    label_coverage,
    ranking_orders,
)
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec, SparseLatents
from rldecoder.seeds import torch_generator


@pytest.fixture(scope="module")
def decoder(tiny_lm_dir: Path) -> SaeDecoderForCausalLM:
    lm = FrozenLM.load(tiny_lm_dir)
    sae = Sae.random_init(SaeSpec(d_model=64, num_latents=40, k=6, hook_layer=2), seed=0)
    decoder = new_decoder(lm, sae)
    with torch.no_grad():
        decoder.W.copy_(torch.randn(40, 64, generator=torch_generator(1)))
    return decoder.requires_grad_(False)


@pytest.fixture
def latents() -> SparseLatents:
    generator = torch_generator(2)
    indices = torch.stack([torch.randperm(40, generator=generator)[:6] for _ in range(30)])
    acts = torch.rand(30, 6, generator=generator)
    acts[:, 5] = 0  # padding
    return SparseLatents(acts, indices)


def test_coverage_counts_failures_and_the_top_features() -> None:
    flags = [True] * 9 + [False] * 3
    found = label_coverage(flags)
    assert found["all"]["coverage"] == 0.75
    assert found["top_10"]["coverage"] == 0.9
    assert "top_50" not in found
    assert found["all"]["low"] < 0.75 < found["all"]["high"]
    assert label_coverage([])["all"]["coverage"] is None


def test_orders_put_padding_last(latents: SparseLatents) -> None:
    attributions = torch.randn(30, 6, generator=torch_generator(3))
    orders = ranking_orders(latents, attributions, latents.acts, torch_generator(4))
    assert set(orders) == {"attribution", "method_a", "random"}
    for order in orders.values():
        assert bool((order[:, -1] == 5).all())
        assert bool((order.sort(-1).values == torch.arange(6)).all())
    assert bool((orders["method_a"][:, 0] == latents.acts.argmax(-1)).all())
    strongest = attributions[:, :5].abs().argmax(-1)
    assert bool((orders["attribution"][:, 0] == strongest).all())


def test_deletion_equals_a_loop(decoder: SaeDecoderForCausalLM, latents: SparseLatents) -> None:
    order = torch.rand(30, 6, generator=torch_generator(5)).argsort(-1)
    found = deletion_scores(decoder, Places(latents), order)
    for row in (0, 7, 29):
        acts, indices = latents.acts[row], latents.indices[row]
        p = decoder.logits(SparseLatents(acts, indices)).softmax(-1)
        token = int(p.argmax())
        for column, k in enumerate(DELETION_KS):
            without, alone = acts.clone(), torch.zeros_like(acts)
            for slot in order[row, :k].tolist():
                alone[slot] = without[slot]
                without[slot] = 0
            lost = p[token] - decoder.logits(SparseLatents(without, indices)).softmax(-1)[token]
            missing = p[token] - decoder.logits(SparseLatents(alone, indices)).softmax(-1)[token]
            assert float(found["comprehensiveness"][row, column]) == pytest.approx(
                float(lost), abs=1e-5
            )
            assert float(found["sufficiency"][row, column]) == pytest.approx(
                float(missing), abs=1e-5
            )


def test_all_features_alone_are_sufficient(
    decoder: SaeDecoderForCausalLM, latents: SparseLatents
) -> None:
    order = torch.arange(6).expand(30, 6)
    found = deletion_scores(decoder, Places(latents), order)
    assert float(found["sufficiency"][:, -1].abs().max()) == pytest.approx(0.0, abs=1e-5)


def test_a_good_ranking_beats_the_random_one(
    decoder: SaeDecoderForCausalLM, latents: SparseLatents
) -> None:
    tokens = decoder.logits(latents).argmax(-1)
    contributions = decoder.contributions(latents, tokens)
    orders = ranking_orders(latents, contributions, latents.acts, torch_generator(6))
    found = deletion_benchmark(decoder, Places(latents), orders, resamples=500, seed=0)
    best, lot = found["attribution"], found["random"]
    assert best["comprehensiveness"]["mean"] > lot["comprehensiveness"]["mean"]
    assert best["comprehensiveness"]["against_random"]["pvalue"] < 0.05
    assert "against_random" not in lot["comprehensiveness"]
    assert best["comprehensiveness"]["mean"] == pytest.approx(
        np.mean(best["comprehensiveness"]["by_k"]), abs=1e-6
    )
