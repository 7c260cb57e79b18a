"""A Ray cluster of several nodes on the loopback, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import psutil

# Before Ray is imported: it listens on the loopback alone, and tells nobody of itself.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

SYSTEM = {
    # A dead node is noticed within seconds.
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
    # A busy machine is no dead one.
    "agent_register_timeout_ms": 300_000,
    "worker_register_timeout_seconds": 300,
    # No workers before they are asked for.
    "prestart_worker_first_driver": False,
    "enable_worker_prestart": False,
}
LOOPBACK = "127.0.0.1"


class LoopbackCluster:
    """Nodes on this machine.

    Args:
        cpus: of the head, which the driver is on.
    """

    def __init__(self, cpus: int = 0) -> None:
        from ray.cluster_utils import Cluster

        _be_patient()
        self.nodes: list[Any] = []
        """Those beside the head that nobody killed."""
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": cpus, "include_dashboard": False, "no_monitor": True,
                "_system_config": SYSTEM, **_node(),
            },
        )  # fmt: skip

    @property
    def address(self) -> str:
        """For `executor.address`."""
        return str(self.cluster.address)

    def add(self, cpus: int = 1, gpus: int = 0) -> Any:
        """Another node."""
        node = self.cluster.add_node(num_cpus=cpus, num_gpus=gpus, **_node())
        self.nodes.append(node)
        return node

    def kill(self, node: Any) -> list[int]:
        """End a node by kill -9, its workers first; their process ids."""
        raylet = _raylet(node)
        workers = [child.pid for child in raylet.children(recursive=True)]
        for pid in (*workers, raylet.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.nodes.remove(node)
        return workers

    def workers(self, node: Any) -> list[psutil.Process]:
        """Our workers on a node."""
        return [child for child in _raylet(node).children(recursive=True) if _is_ours(child)]

    def close(self) -> None:
        """Leave and end it."""
        import ray

        ray.shutdown()
        self.cluster.shutdown()


@contextlib.contextmanager
def loopback_cluster(cpus: int = 0) -> Iterator[LoopbackCluster]:
    """A cluster of a head alone, ended with the block."""
    cluster = LoopbackCluster(cpus)
    try:
        yield cluster
    finally:
        cluster.close()


def _node() -> dict[str, Any]:
    """Where a node listens, and what it does without."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port = listener.getsockname()[1]
    return {
        "node_ip_address": LOOPBACK,
        "runtime_env_agent_port": port,
        "include_log_monitor": False,
    }


def _be_patient() -> None:
    """A node waits 15 seconds for the ports of its agents, Python processes that take longer to
    begin on a busy machine. The ports are known, or none: their files are written before."""
    from ray._private.node import Node
    from ray._raylet import (
        DASHBOARD_AGENT_LISTEN_PORT_NAME,
        METRICS_AGENT_PORT_NAME,
        METRICS_EXPORT_PORT_NAME,
        RUNTIME_ENV_AGENT_PORT_NAME,
        persist_port,
    )

    start = getattr(Node, "_start_at_once", Node.start_ray_processes)

    def start_with_ports(node: Any) -> None:
        ports = {
            METRICS_AGENT_PORT_NAME: -1,
            METRICS_EXPORT_PORT_NAME: -1,
            DASHBOARD_AGENT_LISTEN_PORT_NAME: -1,
            RUNTIME_ENV_AGENT_PORT_NAME: node._ray_params.runtime_env_agent_port,
        }
        for name, port in ports.items():
            persist_port(node._session_dir, node._node_id, name, port)
        start(node)

    Node._start_at_once, Node.start_ray_processes = start, start_with_ports


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _is_ours(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).startswith(("ray::FarWorker", "ray::FarMember"))
    return False
