"""One p(accept) a latent: of its two labels the one that is more likely to pass.

Input and output labels have a model each (`calibration`), fitted to rotations over the same folds
of the `label` split. The threshold of high confidence comes from what is picked: in each rotation
the label with the larger out-of-fold p, and whether that one passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.interp import calibration
from rldecoder.interp.labelling import Confidences
from rldecoder.interp.output_labels import OutputLabelled, Rotation
from rldecoder.interp.output_scores import FAILED
from rldecoder.interp.records import OutputScores

FloatArray = NDArray[np.float64]


def output_confidences(
    found: OutputLabelled, bars: calibration.Acceptance, seed: int
) -> Confidences:
    """p(accept) of output labels, from the rotations alone."""
    features, passed, latents, rotations = [], [], [], []
    for number, rotation in enumerate(found.rotations):
        for row, held in enumerate(rotation.sets):
            if held.failure:
                continue
            features.append(_features(rotation, row))
            passed.append(bars.accepts_output(rotation.outcome[row]))
            latents.append(row)
            rotations.append(number)
    width = len(_of_scores(1.0, FAILED))
    model = calibration.ConfidenceModel(
        calibration.Calibration(
            np.array(features).reshape(-1, width),
            np.array(passed, bool),
            np.array(latents, np.int64),
            np.array(rotations, np.int64),
        ),
        seed=seed,
    )
    # The final set by the means of what its rotations measured. Where no fold gave a set, nothing
    # is known of the one of all folds.
    final, known = [], []
    for row, whole in enumerate(found.sets):
        rows = [_features(r, row) for r in found.rotations if not r.sets[row].failure]
        final.append(np.mean(rows, axis=0) if rows else np.zeros(width))
        known.append(bool(rows) and not whole.failure)
    p, low, high = model.predict(np.array(final).reshape(-1, width))
    p, low, high = (np.where(known, values, 0.0) for values in (p, low, high))
    return Confidences(p, low, high, model)


class Picked(NamedTuple):
    """Of each latent the label that is more likely to pass; [K] each."""

    output: NDArray[np.bool_]
    """Whether it is the output label."""
    p: FloatArray
    low: FloatArray
    high: FloatArray
    levels: list[calibration.Threshold]
    """What each confidence is worth on the rows that it was fitted on."""
    fitted: calibration.Reliability
    """How confidences hold on those rows, out of fold."""


def pick(inputs: Confidences, outputs: Confidences, latents: Sequence[int]) -> Picked:
    """The larger p of each latent, and the levels of what is picked so.

    Args:
        latents: [K] in the rows of both; calibration rows of outputs are numbered by row.
    """
    output = outputs.p > inputs.p

    # Calibration rows know latents and rotations: of each pair the surer kind is what is shown.
    row_of = {latent: row for row, latent in enumerate(latents)}
    best: dict[tuple[int, int], tuple[float, bool]] = {}
    for confidences, by_latent in ((inputs, True), (outputs, False)):
        data = confidences.model.data
        assert data.rotations is not None
        for p, passed, group, rotation in zip(
            confidences.model.out_of_fold(), data.accepted, data.latents, data.rotations,
            strict=True,
        ):  # fmt: skip
            row = row_of[int(group)] if by_latent else int(group)
            if p > best.get((row, int(rotation)), (-1.0, False))[0]:
                best[row, int(rotation)] = (float(p), bool(passed))

    # Levels and reliability of what is picked, not of either kind by itself.
    keys = sorted(best)
    found = np.array([best[key][0] for key in keys])
    passed_best = np.array([best[key][1] for key in keys], bool)
    rows = np.array([row for row, _ in keys], np.int64)
    return Picked(
        output,
        np.where(output, outputs.p, inputs.p),
        np.where(output, outputs.low, inputs.low),
        np.where(output, outputs.high, inputs.high),
        calibration.thresholds(found, passed_best, rows),
        calibration.reliability(found, passed_best),
    )


def _features(rotation: Rotation, row: int) -> list[float]:
    return _of_scores(sum(rotation.sets[row].gains[:1]), rotation.held_out[row])


def _of_scores(top: float, scores: OutputScores) -> list[float]:
    """Numbers known before the test: the gain of the first token, and a held-out fold's scores."""

    def of(value: float | None, missing: float) -> float:
        return missing if value is None else value

    return [
        float(np.log(max(top, 1e-6))),
        float(np.log1p(scores.places)),
        scores.auroc,
        scores.auroc_places,
        float(np.arcsinh(10 * scores.drop)),
        float(np.arcsinh(10 * scores.margin)),
        float(np.arcsinh(10 * of(scores.drop_low, -1.0))),
        float(np.arcsinh(10 * of(scores.margin_low, -1.0))),
        scores.beats_other,
        scores.share,
    ]
