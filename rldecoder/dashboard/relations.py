"""What the clusters say of one latent, for its card."""

from __future__ import annotations

from rldecoder.dashboard.shown import Shown
from rldecoder.interp.cluster_record import ClusterRecord
from rldecoder.schemas import optional

MAX_SHOWN = 12
"""Ids listed of a cluster or of absorption links; the number says how many there are."""


class ClusterShown(Shown):
    """A cluster of several."""

    size: int
    members: tuple[int, ...]
    """Its representative first; some of many."""


class Related(Shown):
    """A latent's relatives; a key only for what there is."""

    cluster: ClusterShown | None = optional()
    alias_of: int | None = optional()
    """Of the representative, where that is another latent."""
    absorbed_by: tuple[int, ...] | None = optional()
    absorbs: tuple[int, ...] | None = optional()
    flags: tuple[str, ...] | None = optional()
    """Why its quality is low."""


class Relations:
    """Clusters, absorption and flags by latent.

    Args:
        record: all clusters, links and flags.
    """

    def __init__(self, record: ClusterRecord) -> None:
        self._members = {
            member: cluster.members for cluster in record.clusters for member in cluster.members
        }
        self._flags = {
            entry.latent: [reason.replace("_", " ") for reason in entry.reasons]
            for entry in record.flagged
        }
        self._absorbed_by: dict[int, list[int]] = {}
        self._absorbs: dict[int, list[int]] = {}
        for link in record.absorption:
            self._absorbed_by.setdefault(link.latent, []).append(link.absorbed_by)
            self._absorbs.setdefault(link.absorbed_by, []).append(link.latent)

    def of(self, latent: int) -> Related:
        """Cluster, links and flags of a latent."""
        members = self._members.get(latent, (latent,))
        alone = len(members) == 1
        links = (found.get(latent) for found in (self._absorbed_by, self._absorbs))
        absorbed_by, absorbs = (None if found is None else found[:MAX_SHOWN] for found in links)
        return Related(
            cluster=None if alone else ClusterShown(size=len(members), members=members[:MAX_SHOWN]),
            alias_of=None if members[0] == latent else members[0],
            absorbed_by=absorbed_by,
            absorbs=absorbs,
            flags=self._flags.get(latent),
        )
