"""Are the claims true, and truer than what simpler methods say? Measured on held-out text.

Every method gives the same number of claims a position as Method B did, each a latent with a
sign, and each is tested by a real removal on the decoder. Precision is the share of claims with
the right sign and an effect above the noise floor.

Axes: N position, n claim (at most max_claims), K active latents, C candidate.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.statistics import bootstrap_mean_ci, paired_bootstrap_pvalue
from rldecoder.explain.explainer import Explainer, Pointers
from rldecoder.explain.pairs import Pairs
from rldecoder.explain.patching import (
    Candidates,
    measure,
    noise_floor,
    random_removals,
)
from rldecoder.sae.model import SparseLatents

METHOD_B = "method_b"
HALVED = 0.5
WITH_STRENGTH = (METHOD_B, "attribution_top_k", "attribution_above_noise")


class ClaimSet(NamedTuple):
    """The claims of one method at N positions, strongest first."""

    latents: Tensor
    """[N, n] int64."""
    signs: Tensor
    """[N, n]: +1 supports, -1 opposes; or the predicted effect in nats, where there is one."""
    mask: Tensor
    """[N, n] bool."""


class ClaimScores(NamedTuple):
    """What interventions say about one method's claims."""

    supported: Tensor
    """[N, n] bool: right sign, above the noise."""
    right_sign: Tensor
    """[N, n] bool."""
    effects: Tensor
    """[N, n]: measured, nats; 0 for features that are not active."""
    above_noise: Tensor
    """[N, n] bool: larger than random directions and than the smallest useful effect."""


def claims_of_method_b(explainer: Explainer, pointers: Pointers, test: Pairs) -> ClaimSet:
    """The explainer's claims."""
    chosen = explainer.choose(pointers)
    count = min(explainer.spec.max_claims, chosen.shape[1])
    order = pointers.logits.masked_fill(~chosen, float("-inf")).argsort(-1, descending=True)
    order = order[:, :count]
    return ClaimSet(
        test.candidates.indices.gather(1, order),
        pointers.effects.gather(1, order),
        chosen.gather(1, order),
    )


def claims_of_baselines(
    explainer: Explainer,
    train: Pairs,
    test: Pairs,
    mask: Tensor,
    noise: Tensor,
    generator: torch.Generator,
) -> dict[str, ClaimSet]:
    """What the simpler methods claim, as many a position as `mask` [N, n] allows.

    - `method_a`: the most active features (over their usual high), all taken as support.
    - `attribution_top_k`: the largest first-order attributions, with their sign.
    - `attribution_above_noise`: the same, those first whose attribution exceeds the noise floor and
      the smallest useful effect.
    - `mean_explanation`: the latents that matter most on average, whatever the text.
    - `prompt_only`: the latents that matter most after this token on average; sees the text's
      last token, not the features.
    - `random_features`: active features and signs by lot.
    """
    count = mask.shape[1]
    latents = test.positions.latents
    scales = explainer.scales[latents.indices]
    normalised = torch.where(scales > 0, latents.acts / scales.clamp_min(1e-9), 0.0)
    active = latents.acts > 0
    lot = torch.rand(active.shape, generator=generator).to(active.device)
    coin = torch.rand(mask.shape, generator=generator).to(active.device)
    attributions = test.candidates.attributions
    attributed = attributions.abs().topk(count, dim=-1).indices
    worthwhile = attributions.abs() > noise.clamp_min(explainer.spec.min_effect)
    # Attributions are nats, far below the 1e6 that puts worthwhile candidates first.
    filtered = (attributions.abs() + 1e6 * worthwhile).topk(count, dim=-1).indices
    by_all, by_token = _mean_effects(train, count)
    rows = [by_token.get(int(token), by_all) for token in test.positions.context_token]
    ones = torch.ones_like(coin)
    return {
        "method_a": ClaimSet(_top(latents, normalised.masked_fill(~active, -1), count), ones, mask),
        "attribution_top_k": ClaimSet(
            test.candidates.indices.gather(1, attributed),
            attributions.gather(1, attributed),
            mask,
        ),
        "attribution_above_noise": ClaimSet(
            test.candidates.indices.gather(1, filtered), attributions.gather(1, filtered), mask
        ),
        "mean_explanation": _fixed_claims([by_all] * len(mask), mask),
        "prompt_only": _fixed_claims(rows, mask),
        "random_features": ClaimSet(
            _top(latents, lot.masked_fill(~active, -1), count), (coin - 0.5).sign(), mask
        ),
    }


def _top(latents: SparseLatents, key: Tensor, count: int) -> Tensor:
    return latents.indices.gather(1, key.topk(count, dim=-1).indices)


def _fixed_claims(rows: list[list[tuple[int, float]]], mask: Tensor) -> ClaimSet:
    latents = torch.zeros(mask.shape, dtype=torch.int64)
    signs = torch.ones(mask.shape)
    for i, row in enumerate(rows):
        for j, (latent, effect) in enumerate(row[: mask.shape[1]]):
            latents[i, j], signs[i, j] = latent, float(np.sign(effect))
    return ClaimSet(latents.to(mask.device), signs.to(mask.device), mask)


def _mean_effects(
    train: Pairs, count: int
) -> tuple[list[tuple[int, float]], dict[int, list[tuple[int, float]]]]:
    """Latents with the largest summed effects: over all pairs, and after each token."""
    total: dict[int, float] = defaultdict(float)
    by_token: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    tokens = train.positions.context_token.tolist()
    indices, effects = train.candidates.indices.tolist(), train.measured.single.tolist()
    for token, row, values in zip(tokens, indices, effects, strict=True):
        for latent, effect in zip(row, values, strict=True):
            total[latent] += effect
            by_token[token][latent] += effect
    everywhere = _largest(total, count)
    # Tokens with few known latents are filled up with those that matter everywhere.
    return everywhere, {
        token: (_largest(found, count) + everywhere)[:count] for token, found in by_token.items()
    }


def _largest(effects: dict[int, float], count: int) -> list[tuple[int, float]]:
    return sorted(effects.items(), key=lambda item: (-abs(item[1]), item[0]))[:count]


def score_claims(
    decoder: SaeDecoderForCausalLM, test: Pairs, claims: ClaimSet, min_effect: float
) -> ClaimScores:
    """Remove every claimed feature and compare with its noise floor."""
    latents = test.positions.latents
    same = latents.indices[:, None, :] == claims.latents[:, :, None]
    acts = (latents.acts[:, None, :] * same).sum(-1)
    nothing = torch.zeros_like(acts)
    wanted = Candidates(
        test.candidates.tokens,
        test.candidates.logprobs,
        acts,
        claims.latents,
        nothing,
        nothing,
        test.candidates.sensitivity,
    )
    effects = measure(decoder, latents, wanted).single
    right_sign = (effects.sign() == claims.signs.sign()) & claims.mask
    size = effects.abs()
    noise = noise_floor(wanted, decoder.W.detach()[claims.latents].norm(dim=-1))
    above = (size > noise) & (size > min_effect) & (acts > 0)
    return ClaimScores(right_sign & above, right_sign, effects, above)


def evaluate_claims(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    train: Pairs,
    test: Pairs,
    pointers: Pointers,
    *,
    generator: torch.Generator,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The comparison table of all methods, with paired bootstrap tests against Method B.

    Positions where Method B claims nothing are left out for every method, and counted.
    """
    ours = claims_of_method_b(explainer, pointers, test)
    methods = {METHOD_B: ours}
    methods |= claims_of_baselines(explainer, train, test, ours.mask, pointers.noise, generator)
    said = ours.mask.any(-1)
    result: dict[str, Any] = {
        "num_positions": len(said),
        "num_explained": int(said.sum()),
        "abstention": 1 - float(said.float().mean()),
        "min_effect_nats": explainer.spec.min_effect,
        "median_noise_nats": _median_noise(pointers, test),
        "methods": {},
        "method_b_against": {},
    }
    if not bool(said.any()):
        return result
    all_effects = test.measured.single.abs().sum(-1)[said]
    precision: dict[str, Any] = {}
    for name, claims in methods.items():
        scores = score_claims(decoder, test, claims, explainer.spec.min_effect)
        counts = claims.mask.sum(-1)[said]
        per_position = scores.supported.sum(-1)[said] / counts
        covered = (scores.effects.abs() * claims.mask).sum(-1)[said] / all_effects.clamp_min(1e-9)
        wrong = ~scores.right_sign & claims.mask & scores.above_noise
        precision[name] = per_position.double().cpu().numpy()
        interval = bootstrap_mean_ci(precision[name], resamples=resamples, seed=seed)
        result["methods"][name] = {
            "precision": interval.mean,
            "precision_low": interval.low,
            "precision_high": interval.high,
            "sign_accuracy": float((scores.right_sign.sum(-1)[said] / counts).mean()),
            "contradicted": float((wrong.sum(-1)[said] / counts).mean()),
            "effect_share": float(covered.mean()),
            "claims_per_position": float(counts.float().mean()),
            "strength_mae_nats": float((claims.signs - scores.effects).abs()[claims.mask].mean())
            if name in WITH_STRENGTH
            else None,
        }
    for name in methods:
        if name != METHOD_B:
            test_result = paired_bootstrap_pvalue(
                precision[METHOD_B], precision[name], resamples=resamples, seed=seed
            )
            result["method_b_against"][name] = test_result._asdict()
    return result


def _median_noise(pointers: Pointers, test: Pairs) -> float:
    active = test.candidates.acts > 0
    return float(pointers.noise[active].median()) if bool(active.any()) else 0.0


@torch.no_grad()
def evaluate_reconstruction(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    test: Pairs,
    pointers: Pointers,
    generator: torch.Generator,
) -> dict[str, dict[str, float]]:
    """How well effects of interventions are predicted from the claims alone.

    `removal` is the kind of intervention seen in training, on new text; `halving` (activations
    times 0.5) was never seen. Mean absolute errors in nats, beside those of predicting no
    effect and of adding up the first-order attributions of all candidates (which reads more
    than the claims).
    """
    unit = explainer.spec.effect_unit
    claimed = explainer.choose(pointers).float()
    halved = random_removals(test.candidates.acts, test.removals.shape[1], generator, HALVED)
    kinds = {
        "removal": (test.removals, test.measured.joint),
        "halving": (
            halved,
            measure(decoder, test.positions.latents, test.candidates, halved).joint,
        ),
    }
    result = {}
    for kind, (removals, joint) in kinds.items():
        predicted = unit * explainer.reconstructor(
            claimed, pointers.effects / unit, removals, test.candidates.logprobs
        )
        linear = torch.einsum("nmc,nc->nm", removals, test.candidates.attributions)
        result[kind] = {
            "claims_mae_nats": float((predicted - joint).abs().mean()),
            "zero_mae_nats": float(joint.abs().mean()),
            "first_order_mae_nats": float((linear - joint).abs().mean()),
        }
    return result
