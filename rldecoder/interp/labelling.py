"""From two splits to scored, calibrated labels: the procedure, and its controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.errors import BadInputError
from rldecoder.interp.calibration import (
    NUM_ROTATIONS,
    Acceptance,
    Calibration,
    ConfidenceModel,
    confidence_features,
)
from rldecoder.interp.corpus import Firings, SplitFirings, TokenGrid, document_folds
from rldecoder.interp.labelers import Evidence, LabelDraft, Labeler
from rldecoder.interp.predicate import num_atoms
from rldecoder.interp.scores import (
    LabelScores,
    ScoringText,
    derangement,
    fit_all_levels,
    means,
    score_all,
)
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.json_records import Row
from rldecoder.sae.metrics import match_l0
from rldecoder.sae.model import Sae

NUM_FEATURES = 6
SPARSITY_TOKENS = 1024
"""Residuals on which a random SAE is made to fire as often as the trained one."""


class Labelled(NamedTuple):
    """Labels of some latents and their scores on another split; rows as in the firings."""

    drafts: list[LabelDraft]
    scores: list[LabelScores]


class Confidences(NamedTuple):
    """p(accept) of each label; 0 for failures."""

    p: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    model: ConfidenceModel


def check_disjoint(fit: TokenGrid, scored: TokenGrid) -> None:
    """Refuse two splits that share a document.

    Raises:
        BadInputError: they do.
    """
    shared = np.intersect1d(fit.docs[fit.valid], scored.docs[scored.valid])
    shared = shared[shared >= 0]
    if shared.size:
        raise BadInputError(
            f"The splits {fit.split} and {scored.split} share {shared.size} documents.",
            "A label must be scored on text that its labeler has not seen.",
            "Rebuild the tokens: their splits are made by document.",
        )


def label_and_score(
    labeler: Labeler,
    fit: SplitFirings,
    scored: SplitFirings,
    vocabulary: Vocabulary,
    window_tokens: int,
    rng: np.random.Generator,
) -> Labelled:
    """Label on one split, score on the other; both have the same latents in the same rows.

    Raises:
        BadInputError: the two share a document.
    """
    check_disjoint(fit.grid, scored.grid)
    drafts = labeler.label(Evidence(fit.grid, fit.firings, vocabulary))
    predicates = [draft.predicate for draft in drafts]
    seen = ScoringText(fit.grid, vocabulary, window_tokens)
    levels = fit_all_levels(seen, predicates, fit.firings)
    text = ScoringText(scored.grid, vocabulary, window_tokens)
    return Labelled(drafts, score_all(text, predicates, scored.firings, rng, levels))


def score_weak(
    labelled: Labelled,
    scored: SplitFirings,
    vocabulary: Vocabulary,
    window_tokens: int,
    rng: np.random.Generator,
) -> list[LabelScores]:
    """The same labels against all firings of `scored`, the weakest too."""
    text = ScoringText(scored.grid, vocabulary, window_tokens)
    predicates = [draft.predicate for draft in labelled.drafts]
    return score_all(text, predicates, scored.firings, rng)


def calibrate(
    labeler: Labeler,
    fit: SplitFirings,
    final: list[LabelDraft],
    vocabulary: Vocabulary,
    window_tokens: int,
    acceptance: Acceptance,
    seed: int,
) -> Confidences:
    """p(accept) of the final labels, from rotations over folds of the fitting split alone.

    See `calibration` for the procedure. `final` are the labels fitted on all of `fit`.
    """
    rng = np.random.default_rng(seed)
    folds = document_folds(fit.grid, NUM_ROTATIONS)
    grids = [fit.grid.restricted(folds == fold) for fold in range(NUM_ROTATIONS)]
    texts = [ScoringText(grid, vocabulary, window_tokens) for grid in grids]

    features: list[list[float]] = []
    accepted: list[bool] = []
    latents: list[int] = []
    rotations: list[int] = []
    measured: list[list[LabelScores]] = [[] for _ in final]
    # Fitted on one fold, measured on the next, judged on the third: no text is used twice.
    for rotation, grid in enumerate(grids):
        part = fit.firings.within(grid.valid.reshape(-1))
        drafts = labeler.label(Evidence(grid, part, vocabulary))
        predicates = [draft.predicate for draft in drafts]
        held_out = score_all(texts[(rotation + 1) % NUM_ROTATIONS], predicates, fit.firings, rng)
        outcome = score_all(texts[(rotation + 2) % NUM_ROTATIONS], predicates, fit.firings, rng)
        for row, draft in enumerate(drafts):
            if draft.predicate is None:
                continue
            measured[row].append(held_out[row])
            features.append(_features(draft, held_out[row]))
            accepted.append(acceptance.accepts(outcome[row]))
            latents.append(draft.latent)
            rotations.append(rotation)

    data = Calibration(
        np.array(features).reshape(-1, NUM_FEATURES),
        np.array(accepted, bool),
        np.array(latents, np.int64),
        np.array(rotations, np.int64),
    )
    model = ConfidenceModel(data, seed=seed)
    rows = [_features(draft, _mean_scores(measured[row])) for row, draft in enumerate(final)]
    p, low, high = model.predict(np.array(rows).reshape(-1, NUM_FEATURES))
    failed = np.array([draft.predicate is None for draft in final], bool)
    p, low, high = (np.where(failed, 0.0, values) for values in (p, low, high))
    return Confidences(p, low, high, model)


def shuffled_control(
    labelled: Labelled,
    scored: SplitFirings,
    vocabulary: Vocabulary,
    window_tokens: int,
    rng: np.random.Generator,
) -> Labelled:
    """The same labels, each scored against another latent (failures left out).

    A method whose shuffled labels score far from 0.5 measures something other than the label.
    """
    rows = np.array([i for i, d in enumerate(labelled.drafts) if d.predicate is not None], int)
    order = derangement(rows.size, rng)
    drafts = [labelled.drafts[int(rows[other])] for other in order]
    text = ScoringText(scored.grid, vocabulary, window_tokens)
    firings = scored.firings.select(rows)
    scores = score_all(text, [draft.predicate for draft in drafts], firings, rng)
    kept = [
        draft._replace(latent=int(latent))
        for draft, latent in zip(drafts, firings.latents, strict=True)
    ]
    return Labelled(kept, scores)


def random_sae(trained: Sae, reader: ActivationReader, num_tokens: int, seed: int) -> Sae:
    """An untrained SAE of the same shape and sparsity, centred on the split's first residuals."""
    batch = next(iter(reader.ordered(num_tokens, columns=("resid",), max_tokens=num_tokens)))
    assert batch.resid is not None
    x = batch.resid.float()
    control = Sae.random_init(trained.spec, seed, mean=x.mean(0))
    if trained.spec.k is None:
        sample = x[:SPARSITY_TOKENS]
        l0 = (trained.encode(sample.to(trained.W_enc.device)).acts > 0).sum(1).float().mean()
        match_l0(control, sample, float(l0))
    return control.eval().requires_grad_(False)


def draw_alive(firings: Firings, count: int, min_firings: int, rng: np.random.Generator) -> Any:
    """Rows [<= count] of latents that fire often enough to be labelled, drawn uniformly."""
    alive = np.flatnonzero(firings.counts >= min_firings)
    return np.sort(rng.choice(alive, min(count, alive.size), replace=False))


def score_rows(methods: Mapping[str, Labelled]) -> list[Row]:
    """All methods' rows of scores.SCORES."""
    return [
        {
            "latent": draft.latent,
            "method": name,
            "labelled": draft.predicate is not None,
            **scores.model_dump(),
        }
        for name, labelled in methods.items()
        for draft, scores in zip(*labelled, strict=True)
    ]


def _features(draft: LabelDraft, held_out: LabelScores | None) -> list[float]:
    atoms = 0 if draft.predicate is None else num_atoms(draft.predicate)
    return confidence_features(draft.fit_score, draft.firings, atoms, held_out)


def _mean_scores(scores: list[LabelScores]) -> LabelScores | None:
    """Mean of the measurements that confidence reads; None without any."""
    if not scores:
        return None
    return scores[0].model_copy(update=means(scores, ("f1", "precision", "detection")))
