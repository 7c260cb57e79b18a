"""The report's tables about claims: are they true, and do they tell what interventions do?"""

from __future__ import annotations

from rldecoder.evals.statistics import PairedTest
from rldecoder.explain.claim_scores import ClaimEvaluation, MethodScores, ReaderScore
from rldecoder.explain.interventions import ALL_KINDS
from rldecoder.explain.methods import METHOD_B
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
HELD_OUT_NAME = "Method B, claims about held-out features"
READERS = {**METHOD_NAMES, NO_CLAIMS: "no explanation"}
KIND_NAMES = {
    "removal": "removal (seen)",
    "halving": "halving",
    "amplifying": "amplifying",
    "swapping": "swapping",
    ALL_KINDS: "all kinds",
}
EMPTY = ""


def precision_columns() -> tuple[str, ...]:
    """Heads of `precision_rows`."""
    return (
        "who claims", "precision", "right sign", "contradicted", "decoder agrees",
        "share of all effects", "strength off by, nats", "Method B ahead by", "p",
    )  # fmt: skip


def precision_rows(claims: ClaimEvaluation) -> list[list[str]]:
    """Precision of every method; below Method B its claims about held-out features."""
    rows = []
    for name, shown in METHOD_NAMES.items():
        scores = claims.methods.get(name)
        if scores is None:
            continue
        rows.append(_precision_row(shown, scores, claims.method_b_against.get(name)))
        if name == METHOD_B and scores.held_out_features is not None:
            rows.append([HELD_OUT_NAME, f"{scores.held_out_features.precision:.3f}", *[EMPTY] * 7])
    return rows


def _precision_row(shown: str, scores: MethodScores, ahead: PairedTest | None) -> list[str]:
    error = scores.strength_mae_nats
    return [
        shown,
        f"{scores.precision:.3f}",
        f"{scores.sign_accuracy:.3f}",
        f"{scores.contradicted:.3f}",
        f"{scores.decoder_agrees:.3f}",
        f"{scores.effect_share:.3f}",
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
    removal, halving = claims.reconstruction.removal, claims.reconstruction.halving
    parts = [
        f"Tested in the frozen model. {claims.num_explained:,} of {claims.num_positions:,} "
        f"held-out predictions got claims; trained on {claims.num_pairs:,} pairs. An effect counts "
        f"when it exceeds {claims.min_effect_nats:.2f} nats and what 95 % of equally long random "
        f"directions do at the same position (median {claims.median_noise_nats:.3f} nats). The "
        "decoder agrees where its own effect on the same token has the claimed sign and exceeds "
        f"{claims.min_effect_nats:.2f} nats.",
        "Added up, the claims predict effects of joint removals with a mean error of "
        f"{removal.claims_mae_nats:.3f} nats (predicting none: {removal.zero_mae_nats:.3f}), of "
        f"halving {halving.claims_mae_nats:.3f} ({halving.zero_mae_nats:.3f}).",
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

    renamed = claims.renamed_labels
    parts.append(
        f"With all labels renamed, {renamed.num_unchanged} of {renamed.num_examples} "
        "examples keep every claim, verdict and number."
    )
    verdicts = claims.example_verdicts
    if sum(verdicts.values()):
        counted = ", ".join(f"{count} {name}" for name, count in verdicts.items())
        parts.append(f"The examples' claims: {counted}.")
    return " ".join(parts)


def simulation_note(claims: ClaimEvaluation) -> str:
    """What the AUROC table is made of."""
    everywhere = claims.simulatability.everywhere
    if everywhere is None:
        return ""
    return (
        "Can a reader of the claims tell which interventions change the frozen model's first "
        f"choice? {claims.simulatability.interventions_per_kind:,} random interventions of each "
        f"kind; {100 * everywhere.changed:.0f} % change it. All methods have one reader, who adds "
        "up what the claims say of the features that an intervention hits. With context, that sum "
        "is read together with log p and the size of the intervention (fitted on removals at other "
        "positions), so that only the claims differ. "
        "One-sided p by a paired bootstrap over positions."
    )
