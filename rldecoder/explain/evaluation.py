"""Are the claims true, and truer than what simpler methods say? Measured on held-out text.

Every method gives the same number of claims a position as Method B did, each a latent with a
sign, and each is tested by a real removal in the frozen model. Precision is the share of claims
with the right sign and an effect above the noise floor. What the same removal does to the decoder
stands beside it.

Axes: N position, n claim (at most max_claims), K active latents, C candidate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import FrozenParts, SaeDecoderForCausalLM
from rldecoder.evals.statistics import FloatArray, bootstrap_mean_ci, paired_bootstrap_pvalue
from rldecoder.explain import claim_scores
from rldecoder.explain.claims import Verdict
from rldecoder.explain.explainer import Explainer, Pointers
from rldecoder.explain.explanation import Explanation
from rldecoder.explain.frozen_effects import measure
from rldecoder.explain.methods import (
    METHOD_B,
    ClaimSet,
    acts_of,
    claims_of_baselines,
    claims_of_method_b,
    point,
)
from rldecoder.explain.pairs import Pairs
from rldecoder.explain.patching import Candidates, decoder_effects, noise_floor, random_removals
from rldecoder.explain.simulatability import evaluate_simulatability

HALVED = 0.5
WITH_STRENGTH = (METHOD_B, "attribution_top_k", "attribution_above_noise")


class Settings(NamedTuple):
    """How an evaluation is made."""

    interventions: int
    """Random interventions a position and kind."""
    resamples: int
    """Of the bootstraps."""
    seed: int
    """Of the bootstraps."""


class ClaimScores(NamedTuple):
    """What interventions say about one method's claims."""

    supported: Tensor
    """[N, n] bool: right sign, above the noise."""
    right_sign: Tensor
    """[N, n] bool."""
    effects: Tensor
    """[N, n]: measured in the frozen model, nats; 0 for features that are not active."""
    above_noise: Tensor
    """[N, n] bool: larger than random directions and than the smallest useful effect."""
    decoder_agrees: Tensor
    """[N, n] bool: the decoder's own effect has the sign, above the smallest useful effect."""


def score_claims(
    decoder: SaeDecoderForCausalLM, test: Pairs, methods: Mapping[str, ClaimSet], min_effect: float
) -> dict[str, ClaimScores]:
    """Remove every claimed feature from both models, and compare with its noise floor.

    Args:
        methods: claims by name; what several of them claim is tested once.
    """
    wanted = _claimed(test, methods)
    effects = measure(decoder.frozen, test.positions.frozen_places, wanted).single
    effects = effects * (wanted.acts > 0)
    on_decoder = decoder_effects(decoder, test.positions.places, wanted.tokens, wanted.indices)
    noise = noise_floor(wanted, decoder.frozen.sae.W_dec.detach()[wanted.indices].norm(dim=-1))
    columns = torch.stack([effects, noise, on_decoder * (wanted.acts > 0)])

    scores = {}
    for name, claims in methods.items():
        # Where each claim's latent is among those that were tested; nowhere, if it is not active.
        same = claims.latents[:, :, None] == wanted.indices[:, None]
        same &= (wanted.acts > 0)[:, None]
        mine, floor, theirs = torch.einsum("snc,njc->snj", columns, same.to(columns.dtype))
        right_sign = (mine.sign() == claims.signs.sign()) & claims.mask
        above = (mine.abs() > floor) & (mine.abs() > min_effect)
        agrees = (theirs * claims.signs.sign() > min_effect) & claims.mask
        scores[name] = ClaimScores(right_sign & above, right_sign, mine, above, agrees)
    return scores


def _claimed(test: Pairs, methods: Mapping[str, ClaimSet]) -> Candidates:
    """The active latents that any method claims at each position, each once."""
    named = torch.cat([claims.latents for claims in methods.values()], dim=1)
    said = torch.cat([claims.mask for claims in methods.values()], dim=1)
    acts = acts_of(test.positions.latents, named)
    wanted = [
        dict(zip(row[keep].tolist(), act[keep].tolist(), strict=True))
        for row, act, keep in zip(named, acts, said & (acts > 0), strict=True)
    ]
    shape = (len(wanted), max(1, *map(len, wanted)))
    latents, values = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for i, row in enumerate(wanted):
        latents[i, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        values[i, : len(row)] = torch.tensor(list(row.values()))
    nothing = torch.zeros_like(values)
    found = test.candidates
    return Candidates(
        found.tokens, found.logprobs, values.to(acts.device), latents.to(acts.device), nothing,
        nothing, found.sensitivity,
    )  # fmt: skip


def evaluate_explainer(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    train: Pairs,
    test: Pairs,
    held_out: Bool[Tensor, " latents"],
    generator: torch.Generator,
    settings: Settings,
    *,
    example_verdicts: dict[Verdict, int],
    renamed_labels: claim_scores.Renaming,
) -> claim_scores.ClaimEvaluation:
    """Everything that is measured about Method B on held-out positions.

    Args:
        held_out: [L] bool, latents that are in no training pair.
        example_verdicts, renamed_labels: what the examples say, which go into the same record.
    """
    frozen = decoder.frozen
    pointers = point(explainer, frozen.sae, test)
    ours = claims_of_method_b(explainer, pointers, test)
    baselines = claims_of_baselines(explainer, train, test, ours.mask, pointers.noise, generator)
    methods = {METHOD_B: ours, **baselines}
    comparison = evaluate_claims(decoder, explainer, test, methods, held_out, settings)
    # The generator's draws come in this order: baselines, reconstruction, interventions.
    reconstruction = evaluate_reconstruction(frozen, explainer, test, pointers, generator)
    active = test.candidates.acts > 0
    return claim_scores.ClaimEvaluation(
        **dict(comparison),
        median_noise_nats=float(pointers.noise[active].median()) if bool(active.any()) else 0.0,
        reconstruction=reconstruction,
        simulatability=evaluate_simulatability(
            frozen,
            train,
            test,
            methods,
            count=settings.interventions,
            generator=generator,
            resamples=settings.resamples,
            seed=settings.seed,
        ),
        num_pairs=len(train.positions.source),
        num_held_out_features=int(held_out.sum()),
        example_verdicts=example_verdicts,
        renamed_labels=renamed_labels,
    )


def evaluate_claims(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    test: Pairs,
    methods: dict[str, ClaimSet],
    held_out: Bool[Tensor, " latents"],
    settings: Settings,
) -> claim_scores.MethodComparison:
    """The comparison table of all methods, with paired bootstrap tests against Method B.

    Positions where Method B claims nothing are left out for every method, and counted.

    Args:
        methods: claims by method, as many a position for each.
        held_out: [L] bool, latents in no training pair; their claims are scored apart, too.
    """
    said = methods[METHOD_B].mask.any(-1)
    all_effects = test.measured.single.abs().sum(-1)[said].clamp_min(1e-9)
    scored: dict[str, claim_scores.MethodScores] = {}
    precision: dict[str, FloatArray] = {}
    found = score_claims(decoder, test, methods, explainer.spec.min_effect)
    for name, claims in methods.items() if bool(said.any()) else ():
        scores = found[name]
        precision[name] = per_position(scores.supported, claims.mask)[said.cpu().numpy()]

        # Share of what the candidates do that the claims speak of.
        covered = (scores.effects.abs() * claims.mask).sum(-1)[said] / all_effects
        unseen = held_out.to(claims.latents.device)[claims.latents] & claims.mask
        scored[name] = claim_scores.MethodScores(
            **_summary(scores, claims, name in WITH_STRENGTH, settings),
            effect_share=float(covered.mean()),
            claims_per_position=float(claims.mask.sum(-1)[said].float().mean()),
            held_out_features=_apart(scores, unseen, settings),
            other_features=_apart(scores, claims.mask & ~unseen, settings),
        )
    return claim_scores.MethodComparison(
        num_positions=len(said),
        num_explained=int(said.sum()),
        abstention=1 - float(said.float().mean()),
        min_effect_nats=explainer.spec.min_effect,
        methods=scored,
        method_b_against={
            name: paired_bootstrap_pvalue(
                precision[METHOD_B], other, resamples=settings.resamples, seed=settings.seed
            )
            for name, other in precision.items()
            if name != METHOD_B
        },
    )


def count_verdicts(examples: Sequence[Explanation]) -> dict[Verdict, int]:
    """How many of the examples' claims have each verdict."""
    verdicts = Counter(checked.verdict for example in examples for checked in example.claims)
    return {verdict: verdicts[verdict] for verdict in get_args(Verdict)}


def per_position(
    holds: Bool[Tensor, "places claims"], mask: Bool[Tensor, "places claims"]
) -> Float[np.ndarray, " places"]:
    """[N]: share of each position's claims that hold; 0 where there is none."""
    return ((holds & mask).sum(-1) / mask.sum(-1).clamp_min(1)).double().cpu().numpy()


def _apart(scores: ClaimScores, mask: Tensor, settings: Settings) -> claim_scores.PartScores | None:
    """Precision of some of the claims, over the positions that have any; None if none has."""
    if not bool(mask.any()):
        return None
    return claim_scores.PartScores(
        **_precision(scores, mask, settings),
        num_claims=int(mask.sum()),
        num_positions=int(mask.any(-1).sum()),
    )


def _precision(scores: ClaimScores, mask: Tensor, settings: Settings) -> dict[str, Any]:
    """Share of a position's claims that hold, with its interval, where there are any."""
    said = mask.any(-1).cpu().numpy()
    interval = bootstrap_mean_ci(
        per_position(scores.supported, mask)[said], resamples=settings.resamples, seed=settings.seed
    )
    keys = ("precision", "precision_low", "precision_high")
    return dict(zip(keys, interval, strict=True))


def _summary(
    scores: ClaimScores, claims: ClaimSet, in_nats: bool, settings: Settings
) -> dict[str, Any]:
    """Precision with its interval, sign accuracy, contradictions, error of the strengths."""
    said = claims.mask.any(-1).cpu().numpy()
    wrong = ~scores.right_sign & scores.above_noise
    off = (claims.signs - scores.effects).abs()[claims.mask].mean()
    return _precision(scores, claims.mask, settings) | {
        "sign_accuracy": float(per_position(scores.right_sign, claims.mask)[said].mean()),
        "contradicted": float(per_position(wrong, claims.mask)[said].mean()),
        "decoder_agrees": float(per_position(scores.decoder_agrees, claims.mask)[said].mean()),
        "strength_mae_nats": float(off) if in_nats else None,
    }


@torch.no_grad()
def evaluate_reconstruction(
    frozen: FrozenParts,
    explainer: Explainer,
    test: Pairs,
    pointers: Pointers,
    generator: torch.Generator,
) -> claim_scores.Reconstruction:
    """How well effects of interventions are predicted by adding up the claims.

    `removal` and `halving` (activations times 0.5) of random candidates. Mean absolute errors in
    nats, beside those of predicting no effect and of adding up the first-order attributions of all
    candidates (which reads more than the claims).
    """
    claimed = explainer.choose(pointers) * pointers.effects
    halved = random_removals(test.candidates.acts, test.removals.shape[1], generator, HALVED)
    effects = measure(frozen, test.positions.frozen_places, test.candidates, halved).joint
    kinds = {"removal": (test.removals, test.measured.joint), "halving": (halved, effects)}

    errors = {}
    for kind, (removals, joint) in kinds.items():
        predicted, linear = (
            torch.einsum("nmc,nc->nm", removals, each)
            for each in (claimed, test.candidates.attributions)
        )
        errors[kind] = claim_scores.EffectErrors(
            claims_mae_nats=float((predicted - joint).abs().mean()),
            zero_mae_nats=float(joint.abs().mean()),
            first_order_mae_nats=float((linear - joint).abs().mean()),
        )
    return claim_scores.Reconstruction(removal=errors["removal"], halving=errors["halving"])
