"""`clusters.json`: near-duplicates, what absorbs what, and latents of low quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from rldecoder.interp.absorption import Link
from rldecoder.interp.corpus import SplitFirings
from rldecoder.interp.records import FeatureLabels
from rldecoder.schemas import JsonRecord, Scalar


class Cluster(JsonRecord):
    """Latents that do the same."""

    representative: int
    """The most important of them."""
    members: tuple[int, ...]
    """The representative first."""
    label: str | None
    """The representative's."""
    importance: float
    """Of all members together, nats a position."""


class Absorbed(JsonRecord):
    """A latent that is silent where its label holds, because another stands in."""

    latent: int
    absorbed_by: int
    cells: int
    """Tokens of the split on which that happens."""
    share: float
    """Of all tokens on which the label holds and the latent is silent."""


Reason = Literal["dead", "ultra_dense", "label_failed"]


class Flagged(JsonRecord):
    """A latent of low quality."""

    latent: int
    reasons: tuple[Reason, ...]


class ClusterRecord(JsonRecord):
    """What the labelled latents are to each other; every latent keeps its id."""

    schema_version: Literal[2] = 2
    """Raised when a reader of the older version could misread a file."""
    sae_digest: str
    """Digest of the SAE that the latents belong to."""
    num_tokens: int
    """Tokens of the `test` split that were read."""
    clusters: tuple[Cluster, ...]
    """Of labelled latents, the most important first; most have one member."""
    aliases: dict[int, int]
    """Representative of each latent that is not its own."""
    absorption: tuple[Absorbed, ...]
    flagged: tuple[Flagged, ...]
    """Of the whole dictionary, by id."""
    counts: dict[Reason, int]
    """Latents by reason."""
    thresholds: dict[str, Scalar]
    """The stage's settings."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        latents = sum(len(cluster.members) for cluster in self.clusters)
        return {
            "latents": latents,
            "clusters": len(self.clusters),
            "merged_latents": latents - len(self.clusters),
            "absorption_links": len(self.absorption),
            "absorbed_latents": len({link.latent for link in self.absorption}),
            "dead_latents": self.counts["dead"],
            "ultra_dense_latents": self.counts["ultra_dense"],
            "label_failed_latents": self.counts["label_failed"],
        }


def cluster_record(
    labels: FeatureLabels,
    members_of: Mapping[int, Sequence[int]],
    links: Sequence[Link],
    split: SplitFirings,
    *,
    ultra_dense: float,
    thresholds: dict[str, Scalar],
) -> ClusterRecord:
    """Put together what was found.

    Args:
        members_of: by representative, itself first.
        split: firings of all latents.
        ultra_dense: share of tokens above which a latent is flagged.
    """
    density = split.firings.counts / split.grid.cells.size
    reasons: dict[Reason, list[int]] = {
        "dead": np.flatnonzero(density == 0).tolist(),
        "ultra_dense": np.flatnonzero(density > ultra_dense).tolist(),
        "label_failed": sorted(f.latent for f in labels.features if f.status == "failed"),
    }
    # A latent may have several reasons, and stands in the list once.
    flagged: dict[int, list[Reason]] = {}
    for reason, latents in reasons.items():
        for latent in latents:
            flagged.setdefault(latent, []).append(reason)

    feature_of = {feature.latent: feature for feature in labels.features}
    return ClusterRecord(
        sae_digest=labels.sae_digest,
        num_tokens=split.grid.cells.size,
        clusters=tuple(
            Cluster(
                representative=latent,
                members=tuple(members),
                label=feature_of[latent].label,
                importance=sum(feature_of[member].importance for member in members),
            )
            for latent, members in members_of.items()
        ),
        aliases={
            member: latent for latent, members in members_of.items() for member in members[1:]
        },
        absorption=tuple(
            Absorbed(
                latent=link.general, absorbed_by=link.special, cells=link.absorbed, share=link.share
            )
            for link in links
        ),
        flagged=tuple(
            Flagged(latent=latent, reasons=tuple(flagged[latent])) for latent in sorted(flagged)
        ),
        counts={reason: len(latents) for reason, latents in reasons.items()},
        thresholds=thresholds,
    )
