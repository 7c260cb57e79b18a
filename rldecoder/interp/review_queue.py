"""The review queue: which labels people should look at first, one of each cluster, and an audit.

A label is worth a look if its latent matters and nobody knows whether it is right: |I| 4p(1 - p).
Near-duplicates teach the same thing twice, so each cluster sends its best label ahead; the others
come after the firsts of all clusters. Verdicts on labels chosen that way say nothing of the labels
that were not chosen, so a share of the queue is drawn uniformly: the *audit*. Its members come in
random order at evenly spread places, and nowhere else, so that any first part of the queue holds a
uniform sample of all labels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rldecoder.errors import DamagedFileError
from rldecoder.interp.records import FeatureLabel, FeatureLabels
from rldecoder.schemas import JsonRecord

FloatArray = NDArray[np.float64]
Why = Literal["audit", "first_of_cluster", "rest_of_cluster", "failed", "reviewed"]


class QueueEntry(JsonRecord):
    """One place in the queue."""

    latent: int
    audit: bool
    """Drawn uniformly; belongs into the verdict, as only such verdicts may recalibrate."""
    cluster: int
    """The representative of the latent's cluster."""
    score: float = Field(ge=0)
    """|I| * 4 p (1 - p), nats a position."""
    why: Why
    """What the place is due to."""


class ReviewQueue(JsonRecord):
    """All labels of a run, the next to look at first."""

    schema_version: Literal[1] = 1
    """Raised when a reader of the older version could misread a file."""
    sae_digest: str
    """Digest of the SAE that the latents belong to; belongs into the verdict."""
    entries: list[QueueEntry]
    """Rank 1 first; each labelled or failed latent once."""

    def ranks(self) -> dict[int, int]:
        """Place of each latent, 1 first."""
        return {entry.latent: rank for rank, entry in enumerate(self.entries, start=1)}

    def waiting(self, labels: FeatureLabels, seen: Collection[int]) -> list[FeatureLabel]:
        """The labels without a verdict, in the queue's order.

        Args:
            labels: those that the queue was made of.
            seen: latents with a verdict that the labels do not know of yet.
        """
        of = {feature.latent: feature for feature in labels.features}
        ordered = [of[entry.latent] for entry in self.entries]
        return [f for f in ordered if f.latent not in seen and not f.reviewed]

    @classmethod
    def load_for(cls, labels: FeatureLabels, path: Path) -> ReviewQueue:
        """Read the queue of these labels.

        Raises:
            DamagedFileError: it is missing, of another form, or of other labels.
        """
        queue = cls.load(path)
        named = sorted(entry.latent for entry in queue.entries)
        if queue.sae_digest != labels.sae_digest or named != sorted(
            f.latent for f in labels.features
        ):
            raise DamagedFileError(
                f"{path} is the queue of other labels.",
                "It names other latents.",
                "Rebuild the clusters: the queue is a part of them.",
            )
        return queue


def queue_scores(importance: FloatArray, confidence: FloatArray) -> FloatArray:
    """|I| * 4 p (1 - p): large where a label matters and nobody knows whether it is right."""
    return np.abs(importance) * 4 * confidence * (1 - confidence)


def draw_audit(latents: Sequence[int], share: float, seed: int) -> frozenset[int]:
    """A uniform sample of `share` of the latents, rounded, at least one if there is any.

    Each latent has a number of its own, and those with the smallest are drawn: so the draw hardly
    moves when more latents are labelled, and verdicts that were given stay those of a sample.

    Args:
        share: 0 draws none.
    """
    if not share or not latents:
        return frozenset()
    number = {latent: np.random.default_rng([seed, latent]).random() for latent in latents}
    count = max(1, round(share * len(latents)))
    return frozenset(sorted(latents, key=lambda latent: number[latent])[:count])


def make_queue(labels: FeatureLabels, cluster_of: Mapping[int, int], seed: int) -> ReviewQueue:
    """Order the labels for review.

    Waiting labels come by score (ties by importance), the best of each cluster first, with the
    audit spread among them. A cluster of which a member was reviewed has had its turn. Then come
    latents without a label, of which there is nothing to judge, and then what was reviewed.

    Args:
        cluster_of: representative of each latent's cluster; a latent not named is alone.
        seed: for the order of the audit.
    """
    features = sorted(labels.features, key=lambda f: f.importance_rank)
    values = queue_scores(
        np.array([f.importance for f in features]), np.array([f.confidence for f in features])
    )
    score = {f.latent: float(value) for f, value in zip(features, values, strict=True)}
    features.sort(key=lambda f: -score[f.latent])  # stable: ties stay by importance

    groups: dict[Why, list[FeatureLabel]] = {
        "audit": [], "first_of_cluster": [], "rest_of_cluster": [], "failed": [], "reviewed": [],
    }  # fmt: skip
    seen = {cluster_of.get(f.latent, f.latent) for f in features if f.reviewed}
    for feature in features:
        cluster = cluster_of.get(feature.latent, feature.latent)
        if feature.reviewed:
            why: Why = "reviewed"
        elif feature.status == "failed":
            why = "failed"
        elif feature.audit:
            why = "audit"
        else:
            why = "rest_of_cluster" if cluster in seen else "first_of_cluster"
            seen.add(cluster)
        groups[why].append(feature)

    # The order of the draw must not follow the scores, or else a first part would be no sample.
    audit = sorted(groups["audit"], key=lambda f: f.latent)
    order = np.random.default_rng(seed).permutation(len(audit))
    groups["audit"] = [audit[i] for i in order]

    why_of = {f.latent: why for why, members in groups.items() for f in members}
    ranked = [*groups["first_of_cluster"], *groups["rest_of_cluster"]]
    queue = [*_spread(ranked, groups["audit"]), *groups["failed"], *groups["reviewed"]]
    return ReviewQueue(
        sae_digest=labels.sae_digest,
        entries=[
            QueueEntry(
                latent=f.latent,
                audit=f.audit,
                cluster=cluster_of.get(f.latent, f.latent),
                score=score[f.latent],
                why=why_of[f.latent],
            )
            for f in queue
        ],
    )


def _spread(ranked: list[FeatureLabel], audit: list[FeatureLabel]) -> list[FeatureLabel]:
    """Both lists in one, in their order, the second at evenly spread places."""
    total = len(ranked) + len(audit)
    places = {int((i + 0.5) * total / len(audit)) for i in range(len(audit))}
    first, second = iter(ranked), iter(audit)
    return [next(second if place in places else first) for place in range(total)]
