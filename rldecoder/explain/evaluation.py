"""Are the claims true, and truer than what simpler methods say? Measured on held-out text.

Every method gives the same number of claims a position as Method B did, each a latent with a
sign, and each is tested by a real removal on the decoder. Precision is the share of claims with
the right sign and an effect above the noise floor.

Axes: N position, n claim (at most max_claims), K active latents, C candidate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.statistics import FloatArray, bootstrap_mean_ci, paired_bootstrap_pvalue
from rldecoder.explain.claim_scores import (
    AblationScores,
    ClaimEvaluation,
    EffectErrors,
    FrozenAgreement,
    MethodComparison,
    MethodScores,
    PartScores,
    Reconstruction,
    Renaming,
)
from rldecoder.explain.claims import Verdict
from rldecoder.explain.explainer import Explainer, Pointers
from rldecoder.explain.explanation import Explanation
from rldecoder.explain.methods import (
    ABLATION,
    METHOD_B,
    ClaimSet,
    acts_of,
    claims_of_baselines,
    claims_of_method_b,
    point,
)
from rldecoder.explain.pairs import Pairs
from rldecoder.explain.patching import (
    Candidates,
    measure,
    noise_floor,
    random_removals,
)
from rldecoder.explain.simulatability import evaluate_simulatability

HALVED = 0.5
WITH_STRENGTH = (METHOD_B, ABLATION, "attribution_top_k", "attribution_above_noise")


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
    """[N, n]: measured, nats; 0 for features that are not active."""
    above_noise: Tensor
    """[N, n] bool: larger than random directions and than the smallest useful effect."""


def score_claims(
    decoder: SaeDecoderForCausalLM, test: Pairs, claims: ClaimSet, min_effect: float
) -> ClaimScores:
    """Remove every claimed feature and compare with its noise floor."""
    latents = test.positions.latents
    acts = acts_of(latents, claims.latents)
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
    effects = measure(decoder, test.positions.places, wanted).single
    right_sign = (effects.sign() == claims.signs.sign()) & claims.mask
    size = effects.abs()
    noise = noise_floor(wanted, decoder.W.detach()[claims.latents].norm(dim=-1))
    above = (size > noise) & (size > min_effect) & (acts > 0)
    return ClaimScores(right_sign & above, right_sign, effects, above)


def evaluate_explainer(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    ablation: Explainer | None,
    train: Pairs,
    test: Pairs,
    held_out: Bool[Tensor, " latents"],
    generator: torch.Generator,
    settings: Settings,
    *,
    frozen_model: FrozenAgreement,
    renamed_labels: Renaming,
) -> ClaimEvaluation:
    """Everything that is measured about Method B on held-out positions.

    Args:
        ablation: the same explainer, trained without the faithfulness regulariser.
        held_out: [L] bool, latents that are in no training pair.
        frozen_model, renamed_labels: what the examples say, which go into the same record.
    """
    pointers = point(explainer, decoder, test)
    ours = claims_of_method_b(explainer, pointers, test)
    baselines = claims_of_baselines(explainer, train, test, ours.mask, pointers.noise, generator)
    methods = {METHOD_B: ours, **baselines}
    comparison = evaluate_claims(decoder, explainer, test, methods, held_out, settings)
    # The generator's draws come in this order: baselines, reconstruction, ablation, interventions.
    reconstruction = evaluate_reconstruction(decoder, explainer, test, pointers, generator)

    readers: dict[str, tuple[ClaimSet, Explainer | None]]
    readers = {name: (claims, None) for name, claims in methods.items()}
    readers[METHOD_B] = (ours, explainer)
    ablated = None
    if ablation is not None:
        theirs = point(ablation, decoder, test)
        claims = claims_of_method_b(ablation, theirs, test, gated=False)
        readers[ABLATION] = (claims, ablation)
        ablated = compare_with_ablation(
            decoder,
            explainer,
            test,
            ours,
            claims,
            settings,
            abstention_with_gates=1 - float(ablation.choose(theirs).any(-1).float().mean()),
            reconstruction=evaluate_reconstruction(
                decoder, ablation, test, theirs, generator, gated=False
            ),
        )

    active = test.candidates.acts > 0
    return ClaimEvaluation(
        **dict(comparison),
        ablation=ablated,
        median_noise_nats=float(pointers.noise[active].median()) if bool(active.any()) else 0.0,
        reconstruction=reconstruction,
        simulatability=evaluate_simulatability(
            decoder,
            train,
            test,
            readers,
            count=settings.interventions,
            generator=generator,
            resamples=settings.resamples,
            seed=settings.seed,
        ),
        num_pairs=len(train.positions.source),
        num_held_out_features=int(held_out.sum()),
        frozen_model=frozen_model,
        renamed_labels=renamed_labels,
    )


def evaluate_claims(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    test: Pairs,
    methods: dict[str, ClaimSet],
    held_out: Bool[Tensor, " latents"],
    settings: Settings,
) -> MethodComparison:
    """The comparison table of all methods, with paired bootstrap tests against Method B.

    Positions where Method B claims nothing are left out for every method, and counted.

    Args:
        methods: claims by method, as many a position for each.
        held_out: [L] bool, latents in no training pair; their claims are scored apart, too.
    """
    said = methods[METHOD_B].mask.any(-1)
    all_effects = test.measured.single.abs().sum(-1)[said].clamp_min(1e-9)
    scored: dict[str, MethodScores] = {}
    precision: dict[str, FloatArray] = {}
    for name, claims in methods.items() if bool(said.any()) else ():
        scores = score_claims(decoder, test, claims, explainer.spec.min_effect)
        precision[name] = per_position(scores.supported, claims.mask)[said.cpu().numpy()]

        # Share of what the candidates do that the claims speak of.
        covered = (scores.effects.abs() * claims.mask).sum(-1)[said] / all_effects
        unseen = held_out.to(claims.latents.device)[claims.latents] & claims.mask
        scored[name] = MethodScores(
            **_summary(scores, claims, name in WITH_STRENGTH, settings),
            effect_share=float(covered.mean()),
            claims_per_position=float(claims.mask.sum(-1)[said].float().mean()),
            held_out_features=_apart(scores, unseen, settings),
            other_features=_apart(scores, claims.mask & ~unseen, settings),
        )
    return MethodComparison(
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


def compare_with_ablation(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    test: Pairs,
    ours: ClaimSet,
    theirs: ClaimSet,
    settings: Settings,
    *,
    abstention_with_gates: float,
    reconstruction: Reconstruction,
) -> AblationScores:
    """Claims of the explainer that was trained without the regulariser, beside Method B's.

    It claims as many features as are worth it, since nothing taught its gates to close in the
    right places; `method_b_ahead` compares precision where both claim.

    Args:
        ours, theirs: claims of Method B and of the ablation.
        abstention_with_gates, reconstruction: what else is known of the ablation.
    """
    said = theirs.mask.any(-1)
    summary: dict[str, Any] = {}
    ahead = None
    if bool(said.any()):
        scores = score_claims(decoder, test, theirs, explainer.spec.min_effect)
        summary = _summary(scores, theirs, True, settings)

        # Paired: only where both say something can one be ahead of the other.
        both = (said & ours.mask.any(-1)).cpu().numpy()
        if both.any():
            mine = score_claims(decoder, test, ours, explainer.spec.min_effect)
            ahead = paired_bootstrap_pvalue(
                per_position(mine.supported, ours.mask)[both],
                per_position(scores.supported, theirs.mask)[both],
                resamples=settings.resamples,
                seed=settings.seed,
            )
    return AblationScores(
        **summary,
        abstention=1 - float(said.float().mean()),
        abstention_with_gates=abstention_with_gates,
        claims_per_position=(
            float(theirs.mask.sum(-1)[said].float().mean()) if bool(said.any()) else 0.0
        ),
        method_b_ahead=ahead,
        reconstruction=reconstruction,
    )


def agreement_with_frozen(examples: Sequence[Explanation]) -> FrozenAgreement:
    """The examples' claims by verdict: what holds on both models, and on the decoder alone."""
    claims = [checked for example in examples for checked in example.claims]
    verdicts = Counter(checked.verdict for checked in claims)
    by_decoder = [c for c in claims if c.verdict in ("supported", "decoder only")]
    same = sum((c.frozen_effect or 0.0) * c.effect > 0 for c in by_decoder)
    return FrozenAgreement(
        num_claims=len(claims),
        verdicts={verdict: verdicts[verdict] for verdict in get_args(Verdict)},
        precision=verdicts["supported"] / len(claims) if claims else None,
        precision_decoder=len(by_decoder) / len(claims) if claims else None,
        same_sign=same / len(by_decoder) if by_decoder else None,
        note="claims of the examples, tested on both models; `same_sign`: of those that the "
        "decoder supports",
    )


def per_position(
    holds: Bool[Tensor, "places claims"], mask: Bool[Tensor, "places claims"]
) -> Float[np.ndarray, " places"]:
    """[N]: share of each position's claims that hold; 0 where there is none."""
    return ((holds & mask).sum(-1) / mask.sum(-1).clamp_min(1)).double().cpu().numpy()


def _apart(scores: ClaimScores, mask: Tensor, settings: Settings) -> PartScores | None:
    """Precision of some of the claims, over the positions that have any; None if none has."""
    said = mask.any(-1).cpu().numpy()
    if not said.any():
        return None
    interval = bootstrap_mean_ci(
        per_position(scores.supported, mask)[said],
        resamples=settings.resamples,
        seed=settings.seed,
    )
    return PartScores(
        precision=interval.mean,
        precision_low=interval.low,
        precision_high=interval.high,
        num_claims=int(mask.sum()),
        num_positions=int(np.sum(said)),
    )


def _summary(
    scores: ClaimScores, claims: ClaimSet, in_nats: bool, settings: Settings
) -> dict[str, Any]:
    """Precision with its interval, sign accuracy, contradictions, error of the strengths."""
    said = claims.mask.any(-1).cpu().numpy()
    interval = bootstrap_mean_ci(
        per_position(scores.supported, claims.mask)[said],
        resamples=settings.resamples,
        seed=settings.seed,
    )
    wrong = ~scores.right_sign & scores.above_noise
    off = (claims.signs - scores.effects).abs()[claims.mask].mean()
    return {
        "precision": interval.mean,
        "precision_low": interval.low,
        "precision_high": interval.high,
        "sign_accuracy": float(per_position(scores.right_sign, claims.mask)[said].mean()),
        "contradicted": float(per_position(wrong, claims.mask)[said].mean()),
        "strength_mae_nats": float(off) if in_nats else None,
    }


@torch.no_grad()
def evaluate_reconstruction(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    test: Pairs,
    pointers: Pointers,
    generator: torch.Generator,
    *,
    gated: bool = True,
) -> Reconstruction:
    """How well effects of interventions are predicted from the claims alone.

    `removal` is the kind of intervention seen in training, on new text; `halving` (activations
    times 0.5) was never seen. Mean absolute errors in nats, beside those of predicting no
    effect and of adding up the first-order attributions of all candidates (which reads more
    than the claims).
    """
    unit = explainer.spec.effect_unit
    claimed = explainer.choose(pointers, gated=gated).float()
    halved = random_removals(test.candidates.acts, test.removals.shape[1], generator, HALVED)
    effects = measure(decoder, test.positions.places, test.candidates, halved).joint
    kinds = {"removal": (test.removals, test.measured.joint), "halving": (halved, effects)}

    errors = {}
    for kind, (removals, joint) in kinds.items():
        reading = explainer.reconstructor(
            claimed, pointers.effects / unit, removals, test.candidates.logprobs
        )
        predicted = unit * reading.effects
        linear = torch.einsum("nmc,nc->nm", removals, test.candidates.attributions)
        errors[kind] = EffectErrors(
            claims_mae_nats=float((predicted - joint).abs().mean()),
            zero_mae_nats=float(joint.abs().mean()),
            first_order_mae_nats=float((linear - joint).abs().mean()),
        )
    return Reconstruction(removal=errors["removal"], halving=errors["halving"])
