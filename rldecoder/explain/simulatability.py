"""Simulatability: can a reader of nothing but the claims tell which interventions matter?

An intervention in the frozen model changes some of the active features. Its outcome is whether the
model's most likely token is another one afterwards: that is what a reader sees, it is common
enough to be measured, it has no threshold to choose, and it is the same event for every method.
All methods have one reader, who adds up what the claims say: `sum_j share_j * strength_j` over the
claimed features that the intervention hits. AUROC is the probability that an intervention that
changes the token has a higher sum than one that does not.

p and the size of the intervention say much without any explanation. So the same sum is also read
together with these two, by a logistic regression that is fitted for each method alike.

Axes: N position, M intervention, K active latents, n claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import FrozenParts
from rldecoder.evals.auroc import compare_auroc
from rldecoder.evals.statistics import FloatArray
from rldecoder.explain.claim_scores import KindScores, ReaderScore, Simulatability
from rldecoder.explain.frozen_effects import run_patched
from rldecoder.explain.interventions import ALL_KINDS, KINDS, SEEN_KIND, random_interventions
from rldecoder.explain.methods import METHOD_B, ClaimSet
from rldecoder.explain.pairs import Pairs
from rldecoder.explain.patching import Candidates
from rldecoder.sae.model import SparseLatents

NO_CLAIMS = "no_claims"
FOLDS = 5


def hit_shares(
    latents: SparseLatents, shares: Float[Tensor, "places interventions active"], claims: ClaimSet
) -> Float[Tensor, "places interventions claims"]:
    """[N, M, n]: the share that each intervention takes from each claimed latent; 0 if not hit."""
    same = latents.indices[:, :, None] == claims.latents[:, None, :]
    active = same & (latents.acts > 0)[:, :, None] & claims.mask[:, None, :]
    return torch.einsum("nmk,nkj->nmj", shares, active.to(shares.dtype))


def read_claims(hit: Tensor, claims: ClaimSet) -> Tensor:
    """[N, M]: what the claims say of each intervention, added up.

    Args:
        hit: [N, M, n] from `hit_shares`.
    """
    return torch.einsum("nmj,nj->nm", hit, claims.strengths * claims.mask)


@torch.no_grad()
def evaluate_simulatability(
    frozen: FrozenParts,
    train: Pairs,
    test: Pairs,
    methods: Mapping[str, ClaimSet],
    *,
    count: int,
    generator: torch.Generator,
    resamples: int,
    seed: int,
) -> Simulatability:
    """AUROC of every method for each kind of intervention and in total, compared with Method B.

    Positions where Method B claims nothing are left out for every method. Beside the plain scores
    the table has `with_context`: the summed effect of the claims, read together with what needs no
    explanation (log p of the token, size of the intervention) by a logistic regression that is
    fitted to removals at other positions (5 folds); `no_claims` reads that context alone.

    Args:
        train: donors of the swapped activations.
        methods: claims by name.
        count: M, interventions a position and kind.
    """
    said = methods[METHOD_B].mask.any(-1)
    interventions = int(said.sum()) * count
    if not interventions:
        return Simulatability(interventions_per_kind=0, kinds={})
    places = test.positions.frozen_places.of(said)
    latents = places.latents
    candidates = Candidates(*(column[said] for column in test.candidates))
    shares = random_interventions(latents, train.positions.latents, count, generator)
    outcomes = {kind: run_patched(frozen, places, shares[kind], candidates) for kind in KINDS}

    scores: dict[str, dict[str, FloatArray]] = {name: {} for name in methods}
    for name, claims in methods.items():
        mine = ClaimSet(*(column[said] for column in claims))
        for kind in KINDS:
            scores[name][kind] = _flat(read_claims(hit_shares(latents, shares[kind], mine), mine))

    # The interventions at one position are no independent items: they are resampled together.
    groups = np.repeat(np.arange(len(latents.acts)), count)
    changed = {kind: outcomes[kind].changed.flatten().cpu().numpy() for kind in KINDS}
    logprobs = _flat(candidates.logprobs[:, None].expand(-1, count))
    context = {kind: np.stack([logprobs, _size(latents, shares[kind])]) for kind in KINDS}
    read = {
        name: _read_with_context(scores.get(name), context, changed, groups)
        for name in (*methods, NO_CLAIMS)
    }

    def compare(
        columns: Mapping[str, Mapping[str, FloatArray]], kinds: tuple[str, ...]
    ) -> dict[str, ReaderScore]:
        found = compare_auroc(
            np.concatenate([changed[k] for k in kinds]),
            {name: np.concatenate([by[k] for k in kinds]) for name, by in columns.items()},
            np.tile(groups, len(kinds)),
            reference=METHOD_B,
            resamples=resamples,
            seed=seed,
        )
        if found is None:
            return {}
        return {
            name: ReaderScore(**interval._asdict(), method_b_ahead=found.ahead.get(name))
            for name, interval in found.scores.items()
        }

    result = {}
    for kind in (*KINDS, ALL_KINDS):
        kinds = KINDS if kind == ALL_KINDS else (kind,)
        sizes = torch.stack([outcomes[k].effects.abs().mean() for k in kinds])
        result[kind] = KindScores(
            seen_in_training=kind == SEEN_KIND,
            changed=float(np.mean([changed[k].mean() for k in kinds])),
            mean_abs_effect_nats=float(sizes.mean()),
            methods=compare(scores, kinds),
            with_context=compare(read, kinds),
        )
    return Simulatability(interventions_per_kind=interventions, kinds=result)


def _flat(values: Tensor) -> FloatArray:
    return values.flatten().double().cpu().numpy()


def _size(latents: SparseLatents, shares: Tensor) -> FloatArray:
    """How much of the active features' activations an intervention changes, as a share."""
    acts = latents.acts[:, None]
    return _flat((shares.abs() * acts).sum(-1) / acts.sum(-1).clamp_min(1e-9))


def _read_with_context(
    scores: Mapping[str, FloatArray] | None,
    context: Mapping[str, FloatArray],
    changed: Mapping[str, Any],
    groups: Any,
) -> dict[str, FloatArray]:
    """Log odds of a change by a reader who also knows the context; fitted to other positions."""

    def columns(kind: str) -> FloatArray:
        rows = [] if scores is None else [scores[kind][None]]
        return np.concatenate([*rows, context[kind]]).T

    read = {kind: np.zeros(len(groups)) for kind in context}
    folds = min(FOLDS, len(np.unique(groups)))
    if folds < 2:
        return read
    for fit, held_out in GroupKFold(folds).split(groups, groups=groups):
        outcome = changed[SEEN_KIND][fit]
        if outcome.all() or not outcome.any():
            continue
        reader = make_pipeline(StandardScaler(), LogisticRegression())
        reader.fit(columns(SEEN_KIND)[fit], outcome)
        for kind in context:
            read[kind][held_out] = reader.decision_function(columns(kind)[held_out])
    return read
