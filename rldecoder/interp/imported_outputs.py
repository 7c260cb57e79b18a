"""Output labels of others, tried as ours are: at the same places, against the same sets.

A set of others stands in the place of the one that was fitted to its latent, and is compared with
those fitted to the other latents. So a score says of it what it says of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rldecoder.interp.control_latents import ControlLatents
from rldecoder.interp.corpus import SplitFirings
from rldecoder.interp.output_labels import OutputLabeler
from rldecoder.interp.output_sets import SetGroup
from rldecoder.interp.records import OutputScores
from rldecoder.interp.scores import derangement
from rldecoder.sae.model import Sae


class Said(NamedTuple):
    """Tokens that somebody says a latent makes the model say."""

    row: int
    """The latent's, in the firings."""
    tokens: tuple[int, ...]
    """Ids, at least one."""


OutputScorer = Callable[[Sequence[Said], np.random.Generator], dict[str, Sequence[OutputScores]]]
"""Scores of the sets by method: `imported`, `shuffled`, `random_sae`."""


class OutputTrials(NamedTuple):
    """What sets of others are tried on, and against."""

    labeler: OutputLabeler
    sae: Sae
    fit: SplitFirings
    """All firings of the labelled latents on the `label` split."""
    scored: SplitFirings
    """The same on the `test` split; the same rows."""
    fitted: Sequence[tuple[int, ...]]
    """Our output sets of these latents; empty for failures."""
    untrained_sae: Sae
    untrained: ControlLatents
    """Latents of the untrained SAE, for the control."""

    def score(
        self, said: Sequence[Said], rng: np.random.Generator
    ) -> dict[str, Sequence[OutputScores]]:
        """Scores by method; an `OutputScorer`.

        `shuffled` tries each set at the places of a latent that another one is said of,
        `random_sae` at those of latents of the untrained SAE; both against the same sets.
        """
        out: dict[str, Sequence[OutputScores]] = {"imported": [], "shuffled": [], "random_sae": []}
        if not said:
            return out
        rows = [held.row for held in said]
        number = len(self.fitted)
        own, turns = self._groups(number, rows, said)
        pairs = of_others(rows, rng)
        places = [rows[place] for place, _ in pairs]
        other, other_turns = self._groups(number, places, [said[label] for _, label in pairs])
        scores = self.labeler.score("imported", self.sae, self.fit, self.scored, [*own, *other])
        out["imported"] = _pick(scores, turns, rows)
        out["shuffled"] = _pick(scores[len(own) :], other_turns, places)

        number = self.untrained.fit.firings.latents.size
        if number:
            places = (np.arange(len(said)) % number).tolist()
            groups, turns = self._groups(number, places, said)
            scores = self.labeler.score(
                "imported-random_sae", self.untrained_sae, *self.untrained, groups
            )
            out["random_sae"] = _pick(scores, turns, places)
        return out

    def _groups(
        self, number: int, places: Sequence[int], said: Sequence[Said]
    ) -> tuple[list[SetGroup], list[int]]:
        """Groups in which every latent has one set at most, and the group of each set.

        Args:
            number: of the latents that they are tried on.
            places: row of the latent that each is tried on.
        """
        seen: Counter[int] = Counter()
        turns = []
        for place in places:
            turns.append(seen[place])
            seen[place] += 1
        size = len(self.fitted)
        groups = []
        for turn in range(max(turns, default=-1) + 1):
            tried: list[tuple[int, ...]] = [()] * number
            rivals = np.zeros((number, size + number), bool)
            rivals[:, :size] = True
            for place, held, its_turn in zip(places, said, turns, strict=True):
                if its_turn == turn:
                    tried[place] = held.tokens
                    rivals[place, held.row] = False
            groups.append(SetGroup([*self.fitted, *tried], size + np.arange(number), rivals))
        return groups, turns


def of_others(rows: Sequence[int], rng: np.random.Generator) -> list[tuple[int, int]]:
    """(place, label): each label on a latent that another one was given to.

    One that meets its own latent, which has several labels, is left out.
    """
    if len(rows) < 2:
        return []
    order = derangement(len(rows), rng).tolist()
    return [(place, label) for place, label in enumerate(order) if rows[place] != rows[label]]


def _pick(
    scores: Sequence[Sequence[OutputScores]], turns: Sequence[int], places: Sequence[int]
) -> list[OutputScores]:
    return [scores[turn][place] for turn, place in zip(turns, places, strict=True)]
