"""The values of the plan's targets, each read from the record that holds it, with what to know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rldecoder.decoder.faithfulness import Faithfulness
from rldecoder.evals.comparison import FROZEN, RL, TaskScore
from rldecoder.evals.targets import Measurement
from rldecoder.explain.claim_scores import ClaimEvaluation
from rldecoder.explain.interpretability import Coverage
from rldecoder.explain.methods import BASELINES, METHOD_B
from rldecoder.gates import GateReport
from rldecoder.interp.tally import ImportanceMass

TOP_K = 10
SAE_METRICS = {
    "l0": "l0_mean",
    "mse": "normalised_mse",
    "explained_variance": "explained_variance",
    "dead_fraction": "dead_fraction",
    "splice_kl": "splice_kl",
    "near_duplicates": "near_duplicate_fraction",
}
"""What the gate's report calls each target of the SAE."""


def sae_values(report: GateReport) -> dict[str, Measurement]:
    """The SAE's targets, with the thresholds that its gate used."""
    measured = {}
    for key, name in SAE_METRICS.items():
        entry = report.get(name)
        measured[key] = (
            Measurement(None) if entry is None else Measurement(entry.value, "", entry.threshold)
        )
    return measured


def task_drop(scores: Sequence[TaskScore], profile: float | None) -> Measurement:
    """Mean over the tasks that the frozen model can do at all.

    Args:
        profile: the threshold of the run's own gate.
    """
    drops = {row.task: row.drop for row in scores if row.model == RL}
    frozen = {row.task: row.score for row in scores if row.model == FROZEN}
    able = [task for task, score in frozen.items() if score > 0]
    if not able:
        return Measurement(None, "the frozen model answers nothing: there is nothing to drop")
    note = ", ".join(f"{task} {drops[task]:+.2f}" for task in able)
    left_out = [task for task in frozen if task not in able]
    if left_out:
        note += f"; frozen scores 0 on {', '.join(left_out)}"
    return Measurement(float(np.mean([drops[task] for task in able])), note, profile)


def ood_ratio(test: Faithfulness, ood: Faithfulness) -> Measurement:
    """Next-token accuracy out of domain over that in domain, beside the frozen model's."""
    if test.accuracy <= 0:
        return Measurement(None, "in-domain accuracy is 0")
    note = ""
    if test.frozen_accuracy > 0:
        note = f"frozen model: {ood.frozen_accuracy / test.frozen_accuracy:.2f}"
    return Measurement(ood.accuracy / test.accuracy, note)


def coverage(found: Coverage) -> Measurement:
    """Share of the labelled features with a label of high confidence."""
    return Measurement(found.coverage, f"of {found.features} features")


def top10_mass(mass: ImportanceMass) -> Measurement:
    """The frozen model's on text where measured, else the first there is; the note has intervals.

    Frozen model and decoder stand beside each other in the note, on the same domain.
    """
    shares = {
        (domain, target): found.top_k[TOP_K].per_position
        for domain, by_target in mass.root.items()
        for target, found in by_target.items()
        if found.top_k is not None and TOP_K in found.top_k
    }
    if not shares:
        return Measurement(None, "no importance was measured")
    best = min(shares, key=lambda place: (place[1] != FROZEN, place[0] != "label"))
    note = "; ".join(
        f"{target} {share.value:.3f}, 95 % interval {share.low:.3f} to {share.high:.3f}"
        for (domain, target), share in shares.items()
        if domain == best[0]
    )
    return Measurement(shares[best].value, f"domain {best[0]}: {note}")


def ahead_of_method_a(claims: ClaimEvaluation) -> Measurement:
    """How much more often claims of Method B hold than Method A's."""
    against = claims.method_b_against.get("method_a")
    if against is None:
        return Measurement(None, "Method B made no claim")
    note = f"95 % interval {against.low:+.2f} to {against.high:+.2f}"
    return Measurement(against.difference, f"{note}, one-sided p {against.pvalue:.4f}")


def claim_precision(claims: ClaimEvaluation) -> Measurement:
    """Share of Method B's claims that hold in the frozen model."""
    ours = claims.methods.get(METHOD_B)
    if ours is None:
        return Measurement(None, "Method B made no claim")
    note = (
        f"95 % interval {ours.precision_low:.2f} to {ours.precision_high:.2f}; says nothing "
        f"at {100 * claims.abstention:.0f} % of the positions; the decoder moves the same way in "
        f"{100 * ours.decoder_agrees:.0f} % of the claims"
    )
    return Measurement(ours.precision, note)


def simulatability(claims: ClaimEvaluation) -> Measurement:
    """The largest p against a listed baseline where all readers know the same context."""
    everywhere = claims.simulatability.everywhere
    if everywhere is None or not everywhere.methods:
        return Measurement(None, "no claim, or no intervention that changed the first choice")

    worst = []
    for readers in (everywhere.methods, everywhere.with_context):
        ahead = {name: readers[name].method_b_ahead for name in BASELINES}
        worst.append(max((test.pvalue, name) for name, test in ahead.items() if test is not None))
    (alone, rival), (pvalue, hardest) = worst

    ours, theirs = (everywhere.with_context[name].auroc for name in (METHOD_B, hardest))
    note = (
        f"all readers know log p and the intervention's size: AUROC {ours:.3f}, hardest baseline "
        f"{hardest} {theirs:.3f}; from the claims alone the largest p is {alone:.4f} ({rival})"
    )
    return Measurement(pvalue, note)
