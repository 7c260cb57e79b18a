"""The report's tables about claims: are they true, and do they tell what interventions do?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHOD_NAMES = {
    "method_b": "Method B",
    "method_a": "Method A (most active)",
    "attribution_above_noise": "attribution above noise",
    "attribution_top_k": "first-order attribution",
    "mean_explanation": "mean explanation",
    "prompt_only": "prompt only",
    "random_features": "random features",
}
ABLATION = "without_regulariser"
ABLATION_NAME = "Method B without the regulariser"
HELD_OUT_NAME = "Method B, claims about held-out features"
READERS = {**METHOD_NAMES, ABLATION: ABLATION_NAME, "no_claims": "no explanation"}
KIND_NAMES = {
    "removal": "removal (seen)",
    "halving": "halving",
    "amplifying": "amplifying",
    "swapping": "swapping",
    "all": "all kinds",
}
EMPTY = ""


def precision_rows(claims: Mapping[str, Any]) -> list[list[str]]:
    """Precision of every method; below Method B its claims about held-out features, and its
    ablation."""
    rows = []
    for name, shown in METHOD_NAMES.items():
        found = claims["methods"].get(name)
        if found is None:
            continue
        rows.append(_precision_row(shown, found, claims["method_b_against"].get(name)))
        unseen = found["held_out_features"]
        if name == "method_b" and unseen is not None:
            rows.append([HELD_OUT_NAME, f"{unseen['precision']:.3f}", *[EMPTY] * 6])
        ablation = claims.get("ablation")
        if name == "method_b" and ablation is not None and "precision" in ablation:
            rows.append(_precision_row(ABLATION_NAME, ablation, ablation["method_b_ahead"]))
    return rows


def _precision_row(
    shown: str, found: Mapping[str, Any], ahead: Mapping[str, Any] | None
) -> list[str]:
    share, off = found.get("effect_share"), found["strength_mae_nats"]
    return [
        shown,
        f"{found['precision']:.3f}",
        f"{found['sign_accuracy']:.3f}",
        f"{found['contradicted']:.3f}",
        EMPTY if share is None else f"{share:.3f}",
        EMPTY if off is None else f"{off:.3f}",
        EMPTY if ahead is None else f"{ahead['difference']:+.3f}",
        EMPTY if ahead is None else f"{ahead['pvalue']:.4f}",
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


def simulation_rows(claims: Mapping[str, Any]) -> list[list[str]]:
    """AUROC of every method by kind of intervention, from the claims alone and with context."""
    kinds = claims["simulatability"]["kinds"]
    if not kinds or not kinds["all"]["methods"]:
        return []
    rows = []
    for name, shown in READERS.items():
        plain, read = (kinds["all"][table].get(name) for table in ("methods", "with_context"))
        if plain is None and read is None:
            continue
        by_kind = [kinds[kind]["methods"].get(name) for kind in KIND_NAMES]
        rows.append([shown, *map(_auroc, by_kind), *_ahead(plain), _auroc(read), *_ahead(read)])
    return rows


def _auroc(found: Mapping[str, Any] | None) -> str:
    return EMPTY if found is None else f"{found['auroc']:.3f}"


def _ahead(found: Mapping[str, Any] | None) -> tuple[str, str]:
    ahead = None if found is None else found["method_b_ahead"]
    if ahead is None:
        return EMPTY, EMPTY
    return f"{ahead['difference']:+.3f}", f"{ahead['pvalue']:.4f}"


def precision_note(claims: Mapping[str, Any]) -> str:
    """What the precision table is made of, reconstruction errors, held-out features."""
    parts = [
        f"{claims['num_explained']:,} of {claims['num_positions']:,} held-out predictions got "
        f"claims; trained on {claims['num_pairs']:,} pairs. An effect counts when it exceeds "
        f"{claims['min_effect_nats']:.2f} nats and what 95 % of equally long random directions do "
        f"at the same position (median {claims['median_noise_nats']:.3f} nats).",
        _reconstruction("From the claims alone, effects of", claims["reconstruction"]),
    ]
    ours = claims["methods"].get("method_b")
    unseen = None if ours is None else ours["held_out_features"]
    if unseen is not None:
        parts.append(
            f"{claims['num_held_out_features']:,} features were in no training pair; of "
            f"{unseen['num_claims']:,} claims about them at {unseen['num_positions']:,} positions "
            f"{100 * unseen['precision']:.0f} % hold "
            f"({100 * unseen['precision_low']:.0f} to {100 * unseen['precision_high']:.0f})."
        )
    ablation = claims.get("ablation")
    if ablation is not None:
        parts.append(
            "Without the regulariser nothing pays for a claim: the price of length would silence "
            f"it at {100 * ablation['abstention_with_gates']:.0f} % of the positions, so there it "
            "claims all that beats the noise floor, five at most."
        )
        parts.append(_reconstruction("From those claims, effects of", ablation["reconstruction"]))
    renamed = claims["renamed_labels"]
    parts.append(
        f"With all labels renamed, {renamed['num_unchanged']} of {renamed['num_examples']} "
        "examples keep every claim, verdict and number."
    )
    frozen = claims["frozen_model"]
    if frozen["num_claims"]:
        parts.append(
            "All this is measured on the decoder. Of the examples' "
            f"{frozen['num_claims']} claims, {frozen['verdicts']['supported']} hold on the frozen "
            f"model, too, and {frozen['verdicts']['decoder only']} on the decoder alone."
        )
    return " ".join(parts)


def _reconstruction(start: str, found: Mapping[str, Any]) -> str:
    removal, halving = found["removal"], found["halving"]
    return (
        f"{start} joint removals are predicted with a mean error of "
        f"{removal['claims_mae_nats']:.3f} nats (predicting none: {removal['zero_mae_nats']:.3f}), "
        f"of halving, never seen in training, {halving['claims_mae_nats']:.3f} "
        f"({halving['zero_mae_nats']:.3f})."
    )


def simulation_note(claims: Mapping[str, Any]) -> str:
    """What the AUROC table is made of."""
    found = claims["simulatability"]
    everywhere = found["kinds"].get("all")
    if everywhere is None:
        return ""
    return (
        f"Can a reader of the claims tell which interventions change the decoder's first choice? "
        f"{found['interventions_per_kind']:,} random interventions of each kind; "
        f"{100 * everywhere['changed']:.0f} % change it. Method B's reader saw removals alone in "
        "training, and knows the probability that its claims state. With context, one kind of "
        "reader adds up the claims of each method, and knows that probability and the size of the "
        "intervention, so that only the claims differ. "
        "One-sided p by a paired bootstrap over positions."
    )
