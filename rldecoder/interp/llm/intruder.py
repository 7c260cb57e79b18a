"""The intruder task for labels in words: which of these windows is the one without the latent?

After Chang et al. 2009 (Reading tea leaves) and 2507.08473, where the reader sees windows alone and
the score is one of the latent. Here the judge sees the label too, as a predicate would be run on
the same windows (`scores.intruder_score`): it is a score of the label, which a wrong label loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.interp.llm.items import Cells, Item, ItemSampler
from rldecoder.interp.scores import INTRUDER_WINDOWS


class Group(NamedTuple):
    """INTRUDER_WINDOWS windows; the latent is strongly active in all but one, and silent there."""

    windows: list[Item]
    odd: int
    """Index of the silent one."""


def draw_groups(
    sampler: ItemSampler,
    fires: Cells,
    acts: NDArray[np.float32],
    count: int,
    rng: np.random.Generator,
) -> list[Group]:
    """`count` groups, each drawn anew; empty if the text has too few windows for one."""
    strong, silent = sampler.strong_and_silent(fires, acts)
    if strong.size < INTRUDER_WINDOWS - 1 or not silent.size:
        return []
    groups = []
    for _ in range(count):
        windows = rng.choice(strong, INTRUDER_WINDOWS - 1, replace=False).tolist()
        odd = int(rng.integers(INTRUDER_WINDOWS))
        windows.insert(odd, int(rng.choice(silent)))
        nothing = np.zeros(0, np.int64)
        items = [Item(sampler.cells(w), nothing, n != odd) for n, w in enumerate(windows)]
        groups.append(Group(items, odd))
    return groups


def judged_intruder(groups: Sequence[Group], answers: Sequence[int | None]) -> float | None:
    """Accuracy corrected for chance: 1 always right, 0 no better than guessing.

    (a - 1 / k) / (1 - 1 / k), with a the share of groups whose silent window was named and k the
    windows of a group, so that never right is -1 / (k - 1).

    Args:
        answers: index of the window named in each group; None, no answer, is wrong.

    None without groups.
    """
    if not groups:
        return None
    right = np.mean([group.odd == a for group, a in zip(groups, answers, strict=True)])
    chance = 1 / INTRUDER_WINDOWS
    return float((right - chance) / (1 - chance))
