"""What an interface says of a latent: one function, used everywhere.

A label is shown only if it passed on unseen text, or a person stands for it. Of any other latent
stands what is known, marked as a description: the tokens on which it fires most strongly, and
those that it raises. Of latents that were not to be labelled nobody took out any: there stand the
tokens that their direction points to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from rldecoder.interp.records import FeatureLabel, FeatureLabels
from rldecoder.interp.vocabulary import visible
from rldecoder.json_records import Row

MARK = "not labelled; "
"""What a description begins with."""
UNSURE = "no sure label; "
"""The same, of a latent whose label is below the bar of confidence."""
NAMED = 4
"""Tokens that a description names."""


class Shown(NamedTuple):
    """What is said of a latent."""

    text: str
    """Never empty; a description begins with MARK. Raw: make it visible before showing it."""
    is_label: bool
    """Whether it is a label, not a description."""
    sure: bool
    """Whether it may be quoted as what is known: of high confidence, or accepted by a person."""
    confidence: float | None
    """p(accept) of the label; None of a description."""
    instead: str | None = None
    """Of a label that is not sure: a description, for where only what is known may be quoted."""


UNKNOWN = Shown(MARK + "fires on none of the text that was read", False, False, None)


def shown(feature: FeatureLabel) -> Shown:
    """What is said of a latent that was to be labelled."""
    stands = feature.kind != "none" or feature.by_person or _accepted_by_person(feature)
    if feature.label is not None and stands:
        sure = feature.high_confidence
        instead = None if sure else UNSURE + description(feature)
        return Shown(feature.label, True, sure, feature.confidence, instead)
    return Shown(MARK + description(feature), False, False, None)


def description(feature: FeatureLabel) -> str:
    """What is known of a latent without its label."""
    if feature.description:
        return feature.description
    # Of an older program: from what its record shows.
    fires_on = [e.tokens[e.focus] for e in feature.examples if e.kind == "top"]
    return described(fires_on, [effect.token for effect in feature.promoted])


def described(fires_on: Sequence[str], raises: Sequence[str], points_to: Sequence[str] = ()) -> str:
    """A description in words.

    Args:
        fires_on: texts of tokens, raw.
        raises: the same; by ablation.
        points_to: the same; what its direction alone would raise, which nobody tested.

    >>> described([" cat", "\\n"], [" sat"])
    'fires most strongly on "cat", "\\\\n"; raises "sat"'
    """
    parts = []
    if fires_on:
        parts.append(f"fires most strongly on {_listed(fires_on)}")
    if raises:
        parts.append(f"raises {_listed(raises)}")
    if points_to:
        parts.append(f"points to {_listed(points_to)}")
    return "; ".join(parts) or "fires on none of the text that was read"


def _listed(texts: Sequence[str]) -> str:
    words = dict.fromkeys(visible(text.strip() or text) for text in texts)
    return ", ".join(f'"{word}"' for word in list(words)[:NAMED])


class ShownLatents:
    """What is said of every latent of a dictionary.

    Args:
        labels: of the most important ones.
        descriptions: a table of `descriptions.DESCRIPTIONS`; None: an older program wrote none.
    """

    def __init__(self, labels: FeatureLabels, descriptions: pa.Table | None = None) -> None:
        self._labels = {feature.latent: shown(feature) for feature in labels.features}
        self._others: dict[int, Row] = {}
        if descriptions is not None:
            self._others = {row["latent"]: row for row in descriptions.to_pylist()}

    @property
    def latents(self) -> list[int]:
        """All of which something is known."""
        return sorted(self._labels.keys() | self._others.keys())

    def of(self, latent: int) -> Shown:
        """What is said of one."""
        if latent in self._labels:
            return self._labels[latent]
        row = self._others.get(latent)
        if row is None:
            return UNKNOWN
        text = described(row["fires_on"], (), row["raises"])
        return Shown(MARK + text, False, False, None)


def _accepted_by_person(feature: FeatureLabel) -> bool:
    said = [r.accept for r in feature.reviews if r.judges(feature.label)]
    return bool(said) and said[-1] is True
