"""Where the shards of a stage are computed: in no digest, for it changes no result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rldecoder.config.base import Config, free


class ExecutorConfig(Config):
    """Who computes the shards of stages that have them. docs/scale.md has the whole of it."""

    type: Literal["local", "ray"] = free("local")
    """`local`: this process, one after the other. `ray`: the workers of a Ray cluster, which reach
    the store at the same path and have the same code."""
    address: str = Field(
        "auto",
        pattern=r"^(auto|local|[A-Za-z0-9._\[\]:-]+:[0-9]+)$",
        json_schema_extra={"digest": False},
    )
    """`auto`: the cluster of this machine, or of RAY_ADDRESS; `local`: one that is started for the
    run, on this machine alone; or `host:port` of the cluster's head."""
    cpus: PositiveInt = free(1)
    """Cores that Ray keeps for a worker, and its threads where `threads` is null."""
    gpus: NonNegativeInt = free(0)
    """Accelerators that Ray keeps for a worker; 0 computes on the CPU."""
    workers: PositiveInt | None = free(None)
    """Most workers; null takes as many as the cluster has room for. A number is asked for at once,
    which makes a cluster that scales itself grow."""
    retries: NonNegativeInt = free(3)
    """How often a shard is done again because its worker, or the worker's machine, was lost; and a
    training in several processes, `local` ones too, goes on from one and the same checkpoint."""
