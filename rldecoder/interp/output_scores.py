"""How good an output label is: does taking the latent out lower its tokens, and only it and only
them?

auroc: the share of the other latents' sets whose mean drop over the same places is smaller than
    that of its own. 0.5 is chance.
auroc_places: the same place by place, the mean over places: an own set that falls most on average,
    thanks to a few places, falls behind here.
drop: mean over documents of log P(set) - log P(set without the latent), and its 95 % interval
    (Student's t over documents, each the mean of its places).
margin: the same for the drop less the drop when another active latent is taken out at the same
    place and the same length.
A failed label is scored 0 everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rldecoder.interp.ablation_pass import Places
from rldecoder.interp.output_sets import SetGroup, Trial
from rldecoder.interp.records import OutputScores

FAILED = OutputScores(
    auroc=0.0, auroc_places=0.0, drop=0.0, drop_low=0.0, drop_high=0.0, other_drop=0.0,
    margin=0.0, margin_low=0.0, margin_high=0.0, beats_other=0.0, share=0.0, places=0, documents=0,
)  # fmt: skip


class _Interval(NamedTuple):
    mean: float
    low: float | None
    high: float | None


def score_outputs(
    places: Places, trial: Trial, sets: SetGroup, group: int, part: NDArray[np.int64], wanted: int
) -> list[OutputScores]:
    """The scores of each latent's set on one part of the text.

    Args:
        sets: the group, which is number `group` of the trial's.
        part: [P] of the places.
    """
    num_latents = len(sets.own)
    order = np.flatnonzero(~np.isnan(trial.drop[:, group]) & (part == wanted))
    order = order[np.argsort(places.row[order], kind="stable")]
    edges = np.searchsorted(places.row[order], np.arange(num_latents + 1))
    rivals = sets.against(np.arange(num_latents))
    return [
        _score(
            places,
            trial,
            group,
            order[edges[row] : edges[row + 1]],
            _rank(trial.sums[group, wanted, row], int(sets.own[row]), rivals[row]),
        )
        for row in range(num_latents)
    ]


def _rank(drops: NDArray[np.float32], own: int, rivals: NDArray[np.bool_]) -> float:
    """Share of the other sets that fall by less; ties count half."""
    others = drops[rivals]
    if not others.size:
        return 0.0
    return float((others < drops[own]).mean() + 0.5 * (others == drops[own]).mean())


def _score(
    places: Places, trial: Trial, group: int, mine: NDArray[np.int64], auroc: float
) -> OutputScores:
    if not mine.size:
        return FAILED
    columns = (trial.drop, trial.other_drop, trial.above, trial.share)
    drop, other, above, share = (column[mine, group].astype(np.float64) for column in columns)
    _, document = np.unique(places.document[mine], return_inverse=True)
    own, margin = _interval(drop, document), _interval(drop - other, document)
    return OutputScores(
        auroc=auroc, auroc_places=float(above.mean()), drop=own.mean, drop_low=own.low,
        drop_high=own.high, other_drop=float(other.mean()), margin=margin.mean,
        margin_low=margin.low, margin_high=margin.high, beats_other=float((drop > other).mean()),
        share=float(share.mean()), places=int(mine.size), documents=int(document.max()) + 1,
    )  # fmt: skip


def _interval(values: NDArray[np.float64], document: NDArray[np.int64]) -> _Interval:
    """Mean over documents and its 95 % interval; None with a single document."""
    means = np.bincount(document, values) / np.bincount(document)
    mean = float(means.mean())
    if means.size < 2:
        return _Interval(mean, None, None)
    reach = float(stats.t.ppf(0.975, means.size - 1) * means.std(ddof=1) / means.size**0.5)
    return _Interval(mean, mean - reach, mean + reach)
