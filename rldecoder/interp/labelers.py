"""Labelers: who says what a latent stands for.

Every labeler implements `Labeler`. A label that cannot be given is None with a reason: it is
counted, scored as wrong, and never replaced by something that looks like a label.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rldecoder.config.interp import PredicateSettings
from rldecoder.interp.candidates import TOKEN_PENALTY, find_candidates, objective
from rldecoder.interp.corpus import Firings, TokenGrid
from rldecoder.interp.predicate import (
    Atom,
    NgramIn,
    Predicate,
    TokenIn,
    conjunction,
    describe,
    disjunction,
    evaluate,
    num_atoms,
)
from rldecoder.interp.vocabulary import Vocabulary

BoolArray = NDArray[np.bool_]
ATOM_PENALTY = 0.02
"""Subtracted from the objective for each further atom."""


class Evidence(NamedTuple):
    """What a labeler may look at: text of one split, never the text it is scored on."""

    grid: TokenGrid
    """Only its valid cells count."""
    firings: Firings
    """Firings on the valid cells of `grid`; one row a latent to be labelled."""
    vocabulary: Vocabulary


class LabelDraft(NamedTuple):
    """What a labeler says about one latent."""

    latent: int
    text: str | None
    """The label for people; None if the labeler failed or abstains."""
    predicate: Predicate | None
    """The label in executable form, where the labeler has one."""
    failure: str | None
    """Why there is no label; None if there is one."""
    fit_score: float
    """The labeler's own score on the evidence, 0 to 1; 0 for a failure."""
    firings: int
    """Cells of the evidence on which the latent fires."""


class Labeler(Protocol):
    """Gives one draft a latent, in the order of the evidence's rows."""

    name: str
    """Goes into `feature_labels.json`."""

    def label(self, evidence: Evidence) -> list[LabelDraft]:
        """Label all latents of the evidence."""
        ...


class PredicateLabeler:
    """The deterministic labeler: the executable predicate that fits the firings best.

    Candidates come from counts (`candidates.find_candidates`); at most `max_atoms` of them are
    joined greedily by and / or, as long as the objective rises by more than a penalty on length.
    """

    name = "predicate-1"

    def __init__(self, settings: PredicateSettings) -> None:
        self.settings = settings

    def label(self, evidence: Evidence) -> list[LabelDraft]:
        """Label all latents of the evidence; see `Labeler`."""
        grid, firings, vocabulary = evidence
        candidates = find_candidates(grid, firings, vocabulary, self.settings)
        cells = grid.cells
        # Firings use the grid's numbering, the search only valid cells.
        number = np.full(grid.num_cells, -1, np.int64)
        number[cells] = np.arange(cells.size)
        masks: dict[Atom, BoolArray] = {}
        drafts = []
        for row, latent in enumerate(firings.latents):
            fires = number[firings.row(row)[0]]
            drafts.append(
                self._draft(int(latent), fires[fires >= 0], candidates[row], evidence, masks)
            )
            if len(masks) * cells.size > MASK_BYTES:
                masks.clear()
        return drafts

    def _draft(
        self,
        latent: int,
        fires: NDArray[np.int64],
        candidates: list[Atom],
        evidence: Evidence,
        masks: dict[Atom, BoolArray],
    ) -> LabelDraft:
        settings = self.settings
        if fires.size < settings.min_firings:
            reason = f"fires on {fires.size} tokens, fewer than {settings.min_firings}"
            return LabelDraft(latent, None, None, reason, 0.0, int(fires.size))
        if not candidates:
            reason = "no token, class or n-gram recurs where it fires"
            return LabelDraft(latent, None, None, reason, 0.0, int(fires.size))
        for atom in candidates:
            if atom not in masks:
                held = evaluate(atom, evidence.grid.tokens, evidence.vocabulary)
                masks[atom] = held.reshape(-1)[evidence.grid.cells]
        predicate, score = combine([(atom, masks[atom]) for atom in candidates], fires, settings)
        if score < settings.min_score:
            reason = f"best predicate scores {score:.3f}, less than {settings.min_score}"
            return LabelDraft(latent, None, None, reason, score, int(fires.size))
        text = describe(predicate, evidence.vocabulary)
        return LabelDraft(latent, text, predicate, None, score, int(fires.size))


MASK_BYTES = 1 << 28
"""Where atoms hold is kept for the next latents, up to this size."""


def combine(
    candidates: list[tuple[Atom, BoolArray]], fires: NDArray[np.int64], settings: PredicateSettings
) -> tuple[Predicate, float]:
    """Join candidates greedily; returns the predicate and its objective without penalties.

    Args:
        candidates: atoms with where they hold [N], not empty.
        fires: the indices, below N, where the latent fires.
    """

    def score(mask: BoolArray) -> float:
        hits, total = np.count_nonzero(mask[fires]), np.count_nonzero(mask)
        return float(objective(settings.objective, hits, total, fires.size, mask.size))

    # With penalties, without them, predicate, and where it holds.
    best: tuple[float, float, Predicate, BoolArray] | None = None
    for atom, mask in candidates:
        raw = score(mask)
        entry = (raw - _cost(atom), raw, atom, mask)
        if best is None or entry[0] > best[0]:
            best = entry
    assert best is not None

    while num_atoms(best[2]) < settings.max_atoms:
        base, improved = best, best
        for atom, mask in candidates:
            if atom == base[2]:
                continue
            extra = _cost(atom) + ATOM_PENALTY
            spent = base[1] - base[0]
            for join, joined in ((conjunction, base[3] & mask), (disjunction, base[3] | mask)):
                raw = score(joined)
                if raw - spent - extra > improved[0] + 1e-12:
                    improved = (raw - spent - extra, raw, join(base[2], atom), joined)
        if improved is base:
            break
        best = improved
    return best[2], best[1]


def _cost(atom: Atom) -> float:
    match atom:
        case TokenIn():
            return TOKEN_PENALTY * (len(atom.tokens) - 1)
        case NgramIn():
            return TOKEN_PENALTY * (len(atom.ngrams) - 1)
        case _:
            return 0.0
