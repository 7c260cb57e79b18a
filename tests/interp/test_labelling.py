from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rldecoder.config.interp import PredicateSettings
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.errors import BadInputError
from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.control_gaps import ScoreSummary
from rldecoder.interp.labelers import Evidence, LabelDraft, PredicateLabeler
from rldecoder.interp.labelling import (
    calibrate,
    check_disjoint,
    draw_alive,
    label_and_score,
    random_sae,
    score_rows,
)
from rldecoder.interp.scores import SCORES, LabelScores

if TYPE_CHECKING:
    from conftest import Planted

GOOD = LabelScores(
    firings=30, precision=0.9, recall=0.9, f1=0.9, auprc=0.8, base_rate=0.01, detection=0.95,
    detection_positive=20, detection_negative=20, fuzzing=0.9, fuzzing_windows=12,
)  # fmt: skip
NOTHING = GOOD.model_copy(update=dict.fromkeys(("f1", "detection", "fuzzing"), 0.0))


def test_splits_that_share_a_document_are_refused(planted: Planted) -> None:
    check_disjoint(planted.fit.grid, planted.scored.grid)
    docs = planted.scored.grid.docs.copy()
    docs[3] = planted.fit.grid.docs[7, 0]
    with pytest.raises(BadInputError, match="share 1 documents"):
        check_disjoint(planted.fit.grid, replace(planted.scored.grid, docs=docs))


class _Spy(PredicateLabeler):
    """Remembers which documents each call could see."""

    def __init__(self) -> None:
        super().__init__(PredicateSettings())
        self.seen: list[set[int]] = []

    def label(self, evidence: Evidence) -> list[LabelDraft]:
        self.seen.append(set(np.unique(evidence.grid.docs[evidence.grid.valid]).tolist()))
        inside = evidence.firings.within(evidence.grid.valid.reshape(-1))
        assert inside.counts.tolist() == evidence.firings.counts.tolist()
        return super().label(evidence)


def test_calibration_folds_share_no_document_and_confidences_are_high_for_planted_features(
    planted: Planted,
) -> None:
    spy = _Spy()
    rng = np.random.default_rng(0)
    found = label_and_score(spy, planted.fit, planted.scored, planted.vocabulary, 16, rng)
    spy.seen.clear()
    acceptance = Acceptance(detection=0.8, precision=0.5)
    confidences = calibrate(
        spy, planted.fit, found.drafts, planted.vocabulary, 16, acceptance, seed=0
    )
    assert len(spy.seen) == 3
    assert not spy.seen[0] & spy.seen[1]
    assert not spy.seen[1] & spy.seen[2]
    assert not spy.seen[0] & spy.seen[2]
    scored_docs = set(np.unique(planted.scored.grid.docs).tolist())
    assert not set.union(*spy.seen) & scored_docs
    assert confidences.p.mean() > 0.8
    assert (confidences.low <= confidences.p).all()
    assert (confidences.p <= confidences.high).all()
    assert confidences.model.data.accepted.mean() > 0.8


def test_failures_count_in_the_summary_as_zero() -> None:
    drafts = [
        LabelDraft(1, "token is a number", planted_predicate(), None, 0.9, 30),
        LabelDraft(2, None, None, "too few", 0.0, 3),
    ]
    from rldecoder.interp.labelling import Labelled

    found = ScoreSummary.of(Labelled(drafts, [GOOD, NOTHING]), ["f1"], [])
    assert (found.latents, found.labelled, found.failed) == (2, 1, 1)
    assert found.means["f1"] == pytest.approx(0.45)
    assert found.means_labelled["f1"] == pytest.approx(0.9)
    rows = score_rows({"label": Labelled(drafts, [GOOD, NOTHING])})
    assert all(set(row) == set(SCORES.names) for row in rows)
    assert [row["labelled"] for row in rows] == [True, False]


def planted_predicate():  # type: ignore[no-untyped-def]
    from rldecoder.interp.predicate import TokenClass

    return TokenClass(name="number")


def test_control_latents_are_alive_and_drawn_once(planted: Planted) -> None:
    firings = planted.fit.firings
    rows = draw_alive(firings, 10, 200, np.random.default_rng(0))
    assert np.unique(rows).size == rows.size == min(10, int((firings.counts >= 200).sum()))
    assert (firings.counts[rows] >= 200).all()


def test_random_sae_is_centred_and_untrained(planted: Planted) -> None:
    reader = ActivationReader(planted.cache, "label")
    control = random_sae(planted.sae, reader, 500, seed=3)
    (batch,) = reader.ordered(500, columns=("resid",), max_tokens=500)
    assert batch.resid is not None
    np.testing.assert_allclose(
        control.b_dec.numpy(), batch.resid.float().mean(0).numpy(), rtol=1e-5
    )
    # As sparse as the trained one, which is no topk.
    ours, theirs = (
        float((sae.encode(batch.resid.float()).acts > 0).sum()) for sae in (control, planted.sae)
    )
    assert ours == pytest.approx(theirs, rel=0.05)
    assert control.W_dec.shape == planted.sae.W_dec.shape
    assert not np.allclose(control.W_dec.numpy(), planted.sae.W_dec.detach().numpy(), atol=0.1)
