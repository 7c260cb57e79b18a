"""How far labels lie above their controls, with intervals over latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rldecoder.evals.statistics import (
    MeanInterval,
    bootstrap_mean_ci,
    paired_bootstrap_pvalue,
    two_sample_bootstrap,
)
from rldecoder.interp.labelers import LabelDraft

GAP_SCORES = ("detection", "f1")
"""Of deterministic labels."""
Scored = tuple[Sequence[LabelDraft], Sequence[Any]]
"""Labels of some latents and their scores, row by row: `Labelled`, or `Judged` in words."""


class Gap(NamedTuple):
    """Mean of labels less mean of control, and its 95 % interval."""

    difference: float
    low: float
    high: float
    latents: int
    """Latents of the labels for which the score is defined."""
    control_latents: int


def control_gaps(
    methods: Mapping[str, Scored], names: Sequence[str] = GAP_SCORES
) -> dict[str, Any]:
    """`controls.json`, `gaps`: by name, score by score; null where a side has no score.

    `label_shuffled`: the same latents with their own and with another's label, so paired, over
    latents with a label. `label_random_sae`: the most important latents of one SAE against drawn
    ones of another. `drawn_random_sae`: like against like, latents drawn alike of both SAEs, on
    the same text. `*_labelled` leave out failures, which otherwise score 0.

    Args:
        methods: `label`, `shuffled`, and unless that was not asked for `random_sae` and `drawn`.
        names: the scores.
    """
    out: dict[str, Any] = {"label_shuffled": {}}
    for score in names:
        out["label_shuffled"][score] = _paired(methods["label"], methods["shuffled"], score)
    for name in ("label", "drawn") if "random_sae" in methods else ():
        found = out[f"{name}_random_sae"] = {}
        for score in names:
            for suffix, labelled_only in (("", False), ("_labelled", True)):
                found[score + suffix] = _unpaired(
                    methods[name], methods["random_sae"], score, labelled_only
                )
    return out


def mean_intervals(
    labelled: Scored, names: Sequence[str] = GAP_SCORES
) -> dict[str, list[float] | None]:
    """95 % intervals over latents of the means of some scores, failures counting 0."""
    out: dict[str, list[float] | None] = {}
    for score in names:
        values = list(_scores(labelled, score).values())
        found = bootstrap_mean_ci(values) if values else None
        out[f"interval_{score}"] = None if found is None else [found.low, found.high]
    return out


def _paired(label: Scored, control: Scored, score: str) -> dict[str, Any] | None:
    own, other = _scores(label, score), _scores(control, score)
    both = [latent for latent in own if latent in other]
    if not both:
        return None
    found = paired_bootstrap_pvalue([own[i] for i in both], [other[i] for i in both])
    return Gap(found.difference, found.low, found.high, len(both), len(both))._asdict()


def _unpaired(
    label: Scored, control: Scored, score: str, labelled_only: bool
) -> dict[str, Any] | None:
    first = list(_scores(label, score, labelled_only).values())
    second = list(_scores(control, score, labelled_only).values())
    if not first or not second:
        return None
    found: MeanInterval = two_sample_bootstrap(np.array(first), np.array(second))
    return Gap(*found, len(first), len(second))._asdict()


def _scores(labelled: Scored, score: str, labelled_only: bool = False) -> dict[int, float]:
    """By latent, where defined."""
    return {
        draft.latent: value
        for draft, scores in zip(*labelled, strict=True)
        if (value := getattr(scores, score)) is not None
        and not (labelled_only and draft.text is None)
    }
