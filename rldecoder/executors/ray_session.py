"""All that is asked of Ray: connect, hire and let go workers, wait for their answers.

Ray is a part that not everybody installs (`pip install rl-decoder[ray]`); nothing else imports it.
It runs whatever it is sent, by pickle: who reaches the ports of a cluster owns its machines. So a
cluster that is started here listens on the loopback alone, and what we send through Ray is the
class of the worker, texts and numbers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rldecoder import interrupts
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.executors.far_member import FarMember
from rldecoder.executors.far_worker import FarProcess, FarWorker
from rldecoder.failures import shown

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10.0
_STAY_INSIDE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""With 0 Ray takes the loopback for this machine's address, as it does by default where there are
firewalls that ask; else it listens on an address of the network, whatever it is told."""


class Gone(NamedTuple):
    """A call that was never answered."""

    why: str


def connect(address: str) -> None:
    """Join a cluster, or start one on this machine alone; once a process.

    Args:
        address: as `executor.address`.

    Raises:
        BadInputError: Ray is not installed, or no cluster is there.
    """
    found = _found(address)
    if found == "local" or _host(found) in ("localhost", LOOPBACK):
        os.environ.setdefault(_STAY_INSIDE, "0")
    ray = _ray()
    if ray.is_initialized():
        return
    common = {"namespace": "rldecoder", "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if found == "local":
            _start(ray, common)
        else:
            # Ray itself tries for minutes.
            host, _, port = found.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            ray.init(address=found, **common)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, f"{found}: {shown(error)}.") from error
    finally:
        interrupts.handle_signals()  # Ray puts a handler of its own for SIGTERM


def _start(ray: Any, common: Mapping[str, object]) -> None:
    """A cluster of this machine alone. Ray waits 15 seconds for processes of its own, which are
    few on a busy machine: a second try finds its files in memory."""
    try:
        ray.init(address="local", include_dashboard=False, **common)
    except Exception as first:  # Ray has no class for it
        ray.shutdown()
        try:
            ray.init(address="local", include_dashboard=False, **common)
        except Exception as error:  # as the first
            ray.shutdown()
            raise NoResourceError(
                "Ray did not start on this machine.",
                f"{shown(error)} (the try before: {shown(first)})",
                "Most often the machine is too busy: run again when it is less so, or name a "
                "cluster that runs already in executor.address.",
            ) from error


def _found(address: str) -> str:
    """The address that `auto` stands for, as Ray looks it up; others as they are."""
    if address != "auto":
        return address
    named = os.environ.get("RAY_ADDRESS", "")
    started = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if not named and started.is_file():
        named = started.read_text(encoding="utf-8").strip()
    if ":" not in named:
        raise _no_cluster(address, "Neither RAY_ADDRESS nor `ray start` names one.")
    return named


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _no_cluster(address: str, why: str) -> BadInputError:
    return BadInputError(
        f"There is no Ray cluster at executor.address {address!r}.",
        why,
        f"Start one (on this machine alone: `{_STAY_INSIDE}=0 ray start --head`), name the "
        "host:port of its head, or set executor.address to local.",
    )


def hire(cpus: int, gpus: int) -> Any:
    """Ask for a worker; it starts when Ray has room for it. Ray does not start it again."""
    return _hire(FarWorker, cpus, gpus, scheduling_strategy="SPREAD")


def hire_together(size: int, cpus: int, gpus: int) -> tuple[Any, list[Any]]:
    """Ask for the members of a team, which start when Ray has room for all of them.

    Returns:
        What Ray keeps for them, for `room_is_kept` and `give_back`; and the members.
    """
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    _ray()
    each = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    places = placement_group([each] * size, strategy="SPREAD")
    members = [
        _hire(
            FarMember, cpus, gpus, own_address,
            scheduling_strategy=PlacementGroupSchedulingStrategy(places, number),
        )
        for number in range(size)
    ]  # fmt: skip
    return places, members


def room_is_kept(places: Any, timeout_seconds: float) -> bool:
    """Whether Ray has found room for a team; waits a little."""
    found: bool = places.wait(timeout_seconds)
    return found


def give_back(places: Any) -> None:
    """Let go what was kept for a team."""
    from ray.util.placement_group import remove_placement_group

    if _ray().is_initialized():
        remove_placement_group(places)


def _hire(
    kind: type[FarProcess], cpus: int, gpus: int, *first: Callable[[], str], **where: Any
) -> Any:
    options = {
        "num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 1, **where,
    }  # fmt: skip
    actor = _ray().remote(kind).options(**options)
    return actor.remote(*first, assigned_devices if gpus else None)


def own_address() -> str:
    """In a worker: the address by which the cluster knows its machine."""
    address: str = _ray().util.get_node_ip_address()
    return address


def assigned_devices() -> Sequence[str]:
    """In a worker: the accelerators that Ray gave it."""
    ids: Sequence[str] = _ray().get_runtime_context().get_accelerator_ids()["GPU"]
    return ids


def kill(actor: Any) -> None:
    """Let a worker go, at once."""
    ray = _ray()
    if ray.is_initialized():
        ray.kill(actor, no_restart=True)


def answered(calls: Sequence[Any], timeout_seconds: float) -> Sequence[Any]:
    """Those of the calls that are answered, or never will be; waits for one."""
    if not calls:
        return []
    ready, _ = _ray().wait(list(calls), num_returns=len(calls), timeout=0)
    if not ready:
        ready, _ = _ray().wait(list(calls), num_returns=1, timeout=timeout_seconds)
    found: Sequence[Any] = ready
    return found


def answer(call: Any) -> str | Gone:
    """What a worker answered, or why it did not.

    Raises:
        BadInputError: workers cannot run this code at all.
    """
    ray = _ray()
    try:
        text: str = ray.get(call)
    except ray.exceptions.RayTaskError as error:  # before the worker's own code could answer
        raise BadInputError(
            "A worker of the cluster cannot run RL-Decoder.",
            f"{type(error.cause).__name__}: {error.cause}" if error.cause else str(error)[-300:],
            "Install the same version, with its extra `ray`, on every machine of the cluster.",
        ) from error
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Gone(f"{type(error).__name__}: {' '.join(lines)[:300]}")
    return text


def room(cpus: int, gpus: int) -> int:
    """Workers that fit into the cluster as it is, whoever else uses it."""
    return sum(_fits(node["Resources"], cpus, gpus) for node in _alive())


def what_is_there(cpus: int, gpus: int) -> str:
    """The cluster's machines beside what a worker wants, for errors."""
    nodes = [
        f"{node['NodeManagerAddress']}: {node['Resources'].get('CPU', 0):g} cores, "
        f"{node['Resources'].get('GPU', 0):g} accelerators"
        for node in _alive()
    ]
    return f"A worker wants {cpus} cores and {gpus} accelerators; there is {'; '.join(nodes)}."


def _alive() -> list[dict[str, Any]]:
    return [node for node in _ray().nodes() if node["Alive"]]


def _fits(resources: dict[str, float], cpus: int, gpus: int) -> int:
    by_cores = int(resources.get("CPU", 0) // cpus)
    return min(by_cores, int(resources.get("GPU", 0) // gpus)) if gpus else by_cores


def _ray() -> Any:
    # Nothing is sent to anybody; the setting is read when Ray is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise BadInputError(
            "executor.type is ray, and Ray is not installed.",
            f"{error}.",
            "Install it: pip install 'rl-decoder[ray]'.",
        ) from error
    return ray
