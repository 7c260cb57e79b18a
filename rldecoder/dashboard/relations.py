"""What the clusters say of one latent, for its card."""

from __future__ import annotations

from typing import Any

from rldecoder.interp.cluster_record import ClusterRecord

MAX_SHOWN = 12
"""Ids listed of a cluster or of absorption links; the number says how many there are."""


class Relations:
    """Clusters, absorption and flags by latent.

    Args:
        record: all clusters, links and flags.
    """

    def __init__(self, record: ClusterRecord) -> None:
        self._members = {
            member: cluster.members for cluster in record.clusters for member in cluster.members
        }
        self._flags = {entry.latent: entry.reasons for entry in record.flagged}
        self._absorbed_by: dict[int, list[int]] = {}
        self._absorbs: dict[int, list[int]] = {}
        for link in record.absorption:
            self._absorbed_by.setdefault(link.latent, []).append(link.absorbed_by)
            self._absorbs.setdefault(link.absorbed_by, []).append(link.latent)

    def of(self, latent: int) -> dict[str, Any]:
        """Cluster (its representative first), links and flags of a latent; only what there is."""
        members = self._members.get(latent, [latent])
        found: dict[str, Any] = {}
        if len(members) > 1:
            found["cluster"] = {"size": len(members), "members": list(members[:MAX_SHOWN])}
            if members[0] != latent:
                found["alias_of"] = members[0]
        for name, links in (("absorbed_by", self._absorbed_by), ("absorbs", self._absorbs)):
            if latent in links:
                found[name] = links[latent][:MAX_SHOWN]
        if latent in self._flags:
            found["flags"] = [str(reason).replace("_", " ") for reason in self._flags[latent]]
        return found
