"""What clusters.json says of one latent, for its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rldecoder import schemas

MAX_SHOWN = 12
"""Ids listed of a cluster or of absorption links; the number says how many there are."""


class Relations:
    """Clusters, absorption and flags by latent.

    Args:
        clusters: content of clusters.json; empty where a folder has none.
    """

    def __init__(self, clusters: dict[str, Any]) -> None:
        self._members = {
            member: cluster["members"]
            for cluster in clusters.get("clusters", ())
            for member in cluster["members"]
        }
        self._flags = {entry["latent"]: entry["reasons"] for entry in clusters.get("flagged", ())}
        self._absorbed_by: dict[int, list[int]] = {}
        self._absorbs: dict[int, list[int]] = {}
        for link in clusters.get("absorption", ()):
            self._absorbed_by.setdefault(link["latent"], []).append(link["absorbed_by"])
            self._absorbs.setdefault(link["absorbed_by"], []).append(link["latent"])

    def of(self, latent: int) -> dict[str, Any]:
        """Cluster (its representative first), links and flags of a latent; only what there is."""
        members = self._members.get(latent, [latent])
        found: dict[str, Any] = {}
        if len(members) > 1:
            found["cluster"] = {"size": len(members), "members": members[:MAX_SHOWN]}
            if members[0] != latent:
                found["alias_of"] = members[0]
        for name, links in (("absorbed_by", self._absorbed_by), ("absorbs", self._absorbs)):
            if latent in links:
                found[name] = links[latent][:MAX_SHOWN]
        if latent in self._flags:
            found["flags"] = [str(reason).replace("_", " ") for reason in self._flags[latent]]
        return found


def read_relations(folder: Path) -> Relations:
    """Of a `cluster_features` artifact."""
    path = folder / "clusters.json"
    return Relations(schemas.read_json(path) if path.is_file() else {})
