"""The report's tables about claims: are they true, and do they tell what interventions do?"""

from __future__ import annotations

from rldecoder.evals.statistics import PairedTest
from rldecoder.explain.claim_scores import (
    AblationScores,
    ClaimEvaluation,
    MethodScores,
    ReaderScore,
    Reconstruction,
)
from rldecoder.explain.interventions import ALL_KINDS
from rldecoder.explain.methods import ABLATION, METHOD_B
from rldecoder.explain.simulatability import NO_CLAIMS

METHOD_NAMES = {
    "method_b": "Method B",
    "method_a": "Method A (most active)",
    "attribution_above_noise": "attribution above noise",
    "attribution_top_k": "first-order attribution",
    "mean_explanation": "mean explanation",
    "prompt_only": "prompt only",
    "random_features": "random features",
}
ABLATION_NAME = "Method B without the regulariser"
HELD_OUT_NAME = "Method B, claims about held-out features"
READERS = {**METHOD_NAMES, ABLATION: ABLATION_NAME, NO_CLAIMS: "no explanation"}
KIND_NAMES = {
    "removal": "removal (seen)",
    "halving": "halving",
    "amplifying": "amplifying",
    "swapping": "swapping",
    ALL_KINDS: "all kinds",
}
EMPTY = ""


def precision_rows(claims: ClaimEvaluation) -> list[list[str]]:
    """Precision of every method; below Method B its claims about held-out features, and its
    ablation."""
    rows = []
    for name, shown in METHOD_NAMES.items():
        scores = claims.methods.get(name)
        if scores is None:
            continue
        share = f"{scores.effect_share:.3f}"
        rows.append(_precision_row(shown, scores, share, claims.method_b_against.get(name)))
        if name != METHOD_B:
            continue
        if scores.held_out_features is not None:
            rows.append([HELD_OUT_NAME, f"{scores.held_out_features.precision:.3f}", *[EMPTY] * 6])
        ablation = claims.ablation
        if ablation is not None and ablation.precision is not None:
            rows.append(_precision_row(ABLATION_NAME, ablation, EMPTY, ablation.method_b_ahead))
    return rows


def _precision_row(
    shown: str, scores: MethodScores | AblationScores, share: str, ahead: PairedTest | None
) -> list[str]:
    error = scores.strength_mae_nats
    return [
        shown,
        f"{scores.precision:.3f}",
        f"{scores.sign_accuracy:.3f}",
        f"{scores.contradicted:.3f}",
        share,
        EMPTY if error is None else f"{error:.3f}",
        *_ahead(ahead),
    ]


def simulation_columns() -> tuple[str, ...]:
    """Heads of `simulation_rows`."""
    return (
        "whose claims are read",
        *(f"AUROC, {name}" for name in KIND_NAMES.values()),
        "Method B ahead by",
        "p",
        "with context, all kinds",
        "Method B ahead by",
        "p",
    )


def simulation_rows(claims: ClaimEvaluation) -> list[list[str]]:
    """AUROC of every method by kind of intervention, from the claims alone and with context."""
    everywhere = claims.simulatability.everywhere
    if everywhere is None or not everywhere.methods:
        return []
    rows = []
    for name, shown in READERS.items():
        plain, read = everywhere.methods.get(name), everywhere.with_context.get(name)
        if plain is None and read is None:
            continue
        by_kind = [claims.simulatability.kinds[kind].methods.get(name) for kind in KIND_NAMES]
        row = [shown, *map(_auroc, by_kind)]
        row += _ahead(plain)
        row += [_auroc(read), *_ahead(read)]
        rows.append(row)
    return rows


def _auroc(score: ReaderScore | None) -> str:
    return EMPTY if score is None else f"{score.auroc:.3f}"


def _ahead(found: ReaderScore | PairedTest | None) -> tuple[str, str]:
    """How far Method B is ahead, and the p of that."""
    test = found.method_b_ahead if isinstance(found, ReaderScore) else found
    if test is None:
        return EMPTY, EMPTY
    return f"{test.difference:+.3f}", f"{test.pvalue:.4f}"


def precision_note(claims: ClaimEvaluation) -> str:
    """What the precision table is made of, reconstruction errors, held-out features."""
    parts = [
        f"{claims.num_explained:,} of {claims.num_positions:,} held-out predictions got "
        f"claims; trained on {claims.num_pairs:,} pairs. An effect counts when it exceeds "
        f"{claims.min_effect_nats:.2f} nats and what 95 % of equally long random directions do "
        f"at the same position (median {claims.median_noise_nats:.3f} nats).",
        _reconstruction("From the claims alone, effects of", claims.reconstruction),
    ]
    # Sentences about what a run has, and none about what it was not asked for.
    ours = claims.methods.get(METHOD_B)
    unseen = None if ours is None else ours.held_out_features
    if unseen is not None:
        parts.append(
            f"{claims.num_held_out_features:,} features were in no training pair; of "
            f"{unseen.num_claims:,} claims about them at {unseen.num_positions:,} positions "
            f"{100 * unseen.precision:.0f} % hold "
            f"({100 * unseen.precision_low:.0f} to {100 * unseen.precision_high:.0f})."
        )

    ablation = claims.ablation
    if ablation is not None:
        parts.append(
            "Without the regulariser nothing pays for a claim: the price of length would silence "
            f"it at {100 * ablation.abstention_with_gates:.0f} % of the positions, so there it "
            "claims all that beats the noise floor, five at most."
        )
        parts.append(_reconstruction("From those claims, effects of", ablation.reconstruction))

    renamed, frozen = claims.renamed_labels, claims.frozen_model
    parts.append(
        f"With all labels renamed, {renamed.num_unchanged} of {renamed.num_examples} "
        "examples keep every claim, verdict and number."
    )
    if frozen.num_claims:
        parts.append(
            "All this is measured on the decoder. Of the examples' "
            f"{frozen.num_claims} claims, {frozen.verdicts['supported']} hold on the frozen "
            f"model, too, and {frozen.verdicts['decoder only']} on the decoder alone."
        )
    return " ".join(parts)


def _reconstruction(start: str, errors: Reconstruction) -> str:
    removal, halving = errors.removal, errors.halving
    return (
        f"{start} joint removals are predicted with a mean error of "
        f"{removal.claims_mae_nats:.3f} nats (predicting none: {removal.zero_mae_nats:.3f}), "
        f"of halving, never seen in training, {halving.claims_mae_nats:.3f} "
        f"({halving.zero_mae_nats:.3f})."
    )


def simulation_note(claims: ClaimEvaluation) -> str:
    """What the AUROC table is made of."""
    everywhere = claims.simulatability.everywhere
    if everywhere is None:
        return ""
    return (
        f"Can a reader of the claims tell which interventions change the decoder's first choice? "
        f"{claims.simulatability.interventions_per_kind:,} random interventions of each kind; "
        f"{100 * everywhere.changed:.0f} % change it. Method B's reader saw removals alone in "
        "training, and knows the probability that its claims state. With context, one kind of "
        "reader adds up the claims of each method, and knows that probability and the size of the "
        "intervention, so that only the claims differ. "
        "One-sided p by a paired bootstrap over positions."
    )
