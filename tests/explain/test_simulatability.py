"""What readers of claims can tell about interventions, against runs of the frozen model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.explainer import Explainer
from rldecoder.explain.interventions import KINDS, borrowed_acts, random_interventions
from rldecoder.explain.methods import METHOD_B, ClaimSet, claims_of_baselines
from rldecoder.explain.pairs import Pairs
from rldecoder.explain.simulatability import (
    NO_CLAIMS,
    evaluate_simulatability,
    hit_shares,
    read_claims,
)
from rldecoder.sae.model import SparseLatents
from rldecoder.seeds import torch_generator


def everything(pairs: Pairs, strengths: torch.Tensor) -> ClaimSet:
    """A claim about every candidate."""
    mask = torch.ones_like(strengths, dtype=torch.bool)
    return ClaimSet(pairs.candidates.indices, strengths.sign(), mask, strengths)


def test_kinds_change_what_they_say(pairs: dict[str, Pairs]) -> None:
    latents, donors = pairs["test"].positions.latents, pairs["label"].positions.latents
    latents = SparseLatents(latents.acts.clone(), latents.indices)
    latents.acts[:, -1] = 0
    found = random_interventions(latents, donors, 5, torch_generator(0))
    assert tuple(found) == KINDS
    for kind, values in (("removal", {1.0}), ("halving", {0.5}), ("amplifying", {-1.0})):
        assert set(found[kind].unique().tolist()) == {0.0} | values, kind
    for shares in found.values():
        assert shares.shape == (60, 5, 12)
        assert bool((shares[..., -1] == 0).all()), "padding is never touched"
        assert bool((shares != 0).any(-1).float().mean() > 0.95)
    swapped = latents.acts[:, None] * (1 - found["swapping"])
    known: dict[int, set[float]] = {}
    for latent, act in zip(donors.indices.flatten(), donors.acts.flatten(), strict=True):
        known.setdefault(int(latent), set()).add(round(float(act), 3))
    touched = found["swapping"] != 0
    for n, m, k in touched.nonzero().tolist():
        allowed = known.get(int(latents.indices[n, k]), {0.0})
        assert any(abs(float(swapped[n, m, k]) - act) < 2e-3 for act in allowed)


def test_borrowed_activations_come_from_the_same_latent() -> None:
    donors = SparseLatents(
        torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]]), torch.tensor([[7, 3], [7, 9], [7, 3]])
    )
    found = borrowed_acts(torch.tensor([[7, 3, 9, 8]]), donors, 200, torch_generator(0))[0]
    assert set(found[:, 0].tolist()) == {1.0, 3.0, 5.0}
    assert set(found[:, 1].tolist()) == {2.0, 4.0}
    assert float(found[:, 2:].abs().max()) == 0.0, "inactive, or in no donor at all"
    nothing = SparseLatents(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    assert float(borrowed_acts(torch.tensor([[0, 1]]), nothing, 3, torch_generator(0)).max()) == 0


def test_only_claimed_and_active_features_count() -> None:
    latents = SparseLatents(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[4, 5, 6]]))
    shares = torch.tensor([[[1.0, 0.0, 0.0], [0.5, -1.0, 0.0]]])
    claims = ClaimSet(
        torch.tensor([[5, 4, 6, 4, 9]]),
        torch.ones(1, 5),
        torch.tensor([[True, True, True, False, True]]),
        torch.tensor([[10.0, 1.0, 100.0, 50.0, 1000.0]]),
    )
    hit = hit_shares(latents, shares, claims)
    assert hit.tolist() == [[[0, 1, 0, 0, 0], [-1, 0.5, 0, 0, 0]]]
    assert read_claims(hit, claims).tolist() == [[1.0, -9.5]]


def test_claims_that_know_are_ahead_and_wrong_ones_behind(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    explainer.scales.fill_(1.0)
    train, test = pairs["label"], pairs["test"]
    knowing = everything(test, test.measured.single)
    silent = torch.zeros_like(test.candidates.acts)
    baselines = claims_of_baselines(
        explainer, train, test, knowing.mask, silent, torch_generator(0)
    )
    methods = {
        METHOD_B: knowing,
        "wrong": knowing._replace(strengths=-knowing.strengths),
        "same": knowing,
        **baselines,
    }
    found = evaluate_simulatability(
        decoder.frozen, train, test, methods,
        count=4, generator=torch_generator(1), resamples=200, seed=0,
    )  # fmt: skip
    assert found.interventions_per_kind == 240
    assert set(found.kinds) == {*KINDS, "all"}
    assert [kind for kind, entry in found.kinds.items() if entry.seen_in_training] == ["removal"]
    everywhere = found.kinds["all"]
    assert everywhere.changed == pytest.approx(
        np.mean([found.kinds[kind].changed for kind in KINDS])
    )
    table = everywhere.methods
    assert table[METHOD_B].method_b_ahead is None
    assert table[METHOD_B].auroc > 0.7
    for name in ("wrong", "mean_explanation", "prompt_only", "random_features"):
        ahead = table[name].method_b_ahead
        assert ahead is not None
        assert ahead.pvalue < 0.05, name
    assert table["wrong"].auroc == pytest.approx(1 - table[METHOD_B].auroc)
    ahead = table["same"].method_b_ahead
    assert ahead is not None
    assert (ahead.difference, ahead.pvalue) == (0.0, 1.0)
    read = everywhere.with_context
    # A fitted reader turns wrong signs round; nothing to read is worse than true claims.
    assert read["wrong"].auroc == pytest.approx(read[METHOD_B].auroc, abs=1e-6)
    assert read[NO_CLAIMS].auroc < read[METHOD_B].auroc
    assert NO_CLAIMS not in table


def test_positions_without_claims_are_left_out(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    test = pairs["test"]
    claims = everything(test, test.measured.single)
    mask = claims.mask & (torch.arange(60) < 25)[:, None]
    found = evaluate_simulatability(
        decoder.frozen, pairs["label"], test, {METHOD_B: claims._replace(mask=mask)},
        count=2, generator=torch_generator(1), resamples=100, seed=0,
    )  # fmt: skip
    assert found.interventions_per_kind == 50
