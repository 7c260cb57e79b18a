"""Labels beside their controls: means over latents, and how far apart they are, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from rldecoder.evals.statistics import (
    Interval,
    bootstrap_mean_ci,
    paired_bootstrap_pvalue,
    two_sample_bootstrap,
)
from rldecoder.interp.labelers import LabelDraft
from rldecoder.interp.scores import means
from rldecoder.schemas import JsonRecord

GAP_SCORES = ("detection", "f1")
"""Of deterministic labels."""
Scored = tuple[Sequence[LabelDraft], Sequence[Any]]
"""Labels of some latents and their scores, row by row: `Labelled`, or `Judged` in words."""


class Gap(JsonRecord):
    """Mean of labels less mean of control, and its 95 % interval."""

    difference: float
    low: float
    high: float
    latents: int
    """Latents of the labels for which the score is defined."""
    control_latents: int


class ControlGaps(JsonRecord):
    """Gaps by score; None where a side has no score. `<score>_labelled` leaves out failures, which
    otherwise score 0."""

    label_shuffled: dict[str, Gap | None]
    """The same latents with their own and with another's label, so paired, over latents with a
    label."""
    label_random_sae: dict[str, Gap | None] | None = Field(None, exclude_if=lambda gaps: not gaps)
    """The most important latents of one SAE against drawn ones of another; absent where that was
    not asked for."""
    drawn_random_sae: dict[str, Gap | None] | None = Field(None, exclude_if=lambda gaps: not gaps)
    """Like against like, latents drawn alike of both SAEs, on the same text; absent likewise."""

    def numbers(self, prefix: str, scores: Sequence[str]) -> dict[str, float | None]:
        """Drawn latents above the random SAE's, for the manifest."""
        gaps = self.drawn_random_sae or {}
        out: dict[str, float | None] = {}
        for score in scores:
            gap, name = gaps[score], f"{prefix}_{score}"
            out[name] = None if gap is None else gap.difference
            out[f"{name}_low"] = None if gap is None else gap.low
            out[f"{name}_high"] = None if gap is None else gap.high
        return out


class ScoreSummary(JsonRecord):
    """Counts and means over latents. In JSON the means lie flat: `mean_<score>` and so on."""

    latents: int
    labelled: int
    failed: int
    means: dict[str, float | None]
    """By score, over all latents: a failure scores 0. None where no latent has the score."""
    means_labelled: dict[str, float | None]
    """The same over those that got a label."""
    intervals: dict[str, Interval | None]
    """95 % intervals over latents of some of the means."""

    @classmethod
    def of(cls, found: Scored, names: Sequence[str], sure: Sequence[str], **more: Any) -> Self:
        """Summarise.

        Args:
            sure: those of them that get an interval.
            more: what a subclass adds.
        """
        good = [scores for draft, scores in zip(*found, strict=True) if draft.text is not None]
        values = {name: list(_scores(found, name).values()) for name in sure}
        return cls(
            latents=len(found[0]),
            labelled=len(good),
            failed=len(found[0]) - len(good),
            means=means(found[1], names),
            means_labelled=means(good, names),
            intervals={
                name: Interval(*bootstrap_mean_ci(found)[1:]) if found else None
                for name, found in values.items()
            },
            **more,
        )

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "means" in data:
            return data
        nested: dict[str, Any] = {}
        for key, value in data.items():
            for field, prefix, suffix in _FLAT:
                if field in cls.model_fields and key.startswith(prefix) and key.endswith(suffix):
                    score = key.removeprefix(prefix).removesuffix(suffix)
                    nested.setdefault(field, {})[score] = value
                    break
            else:
                nested[key] = value
        return nested

    @model_serializer(mode="wrap")
    def _flat(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = plain(self)
        for field, prefix, suffix in _FLAT:
            for score, value in values.pop(field, {}).items():
                values[f"{prefix}{score}{suffix}"] = value
        return values


_FLAT = (
    ("intervals", "interval_", ""),
    ("means_labelled", "mean_", "_labelled"),
    ("means_shuffled", "mean_", "_shuffled"),
    ("means", "mean_", ""),
)
"""Fields of summaries, and what stands around a score's name in JSON; the open end comes last."""


def control_gaps(methods: Mapping[str, Scored], names: Sequence[str] = GAP_SCORES) -> ControlGaps:
    """How far labels lie above their controls.

    Args:
        methods: `label`, `shuffled`, and unless that was not asked for `random_sae` and `drawn`.
    """
    shuffled = {name: _paired(methods["label"], methods["shuffled"], name) for name in names}
    if "random_sae" not in methods:
        return ControlGaps(label_shuffled=shuffled)
    above: dict[str, dict[str, Gap | None]] = {"label": {}, "drawn": {}}
    for method, gaps in above.items():
        for name in names:
            for suffix, labelled_only in (("", False), ("_labelled", True)):
                gaps[name + suffix] = _unpaired(
                    methods[method], methods["random_sae"], name, labelled_only
                )
    return ControlGaps(
        label_shuffled=shuffled, label_random_sae=above["label"], drawn_random_sae=above["drawn"]
    )


def _paired(label: Scored, control: Scored, score: str) -> Gap | None:
    own, other = _scores(label, score), _scores(control, score)
    both = [latent for latent in own if latent in other]
    if not both:
        return None
    found = paired_bootstrap_pvalue([own[i] for i in both], [other[i] for i in both])
    gap = found.model_dump(exclude={"pvalue"})
    return Gap(**gap, latents=len(both), control_latents=len(both))


def _unpaired(label: Scored, control: Scored, score: str, labelled_only: bool) -> Gap | None:
    first = list(_scores(label, score, labelled_only).values())
    second = list(_scores(control, score, labelled_only).values())
    if not first or not second:
        return None
    difference, low, high = two_sample_bootstrap(np.array(first), np.array(second))
    return Gap(
        difference=difference, low=low, high=high, latents=len(first), control_latents=len(second)
    )


def _scores(labelled: Scored, score: str, labelled_only: bool = False) -> dict[int, float]:
    """By latent, where defined."""
    return {
        draft.latent: value
        for draft, scores in zip(*labelled, strict=True)
        if (value := getattr(scores, score)) is not None
        and not (labelled_only and draft.text is None)
    }
