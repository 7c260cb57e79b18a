"""Accelerators of this machine: what there is, what is free, and a lease that one task holds.

A lease is an `flock` on one file a device. The kernel drops it when its last holder dies, however
it dies, so that no crash leaves a device locked (Prefect's own file locks do, after kill -9).
Leases hold for all runs of one user by default: two runs in two stores still never share a device.
Of other users' work the driver tells (free memory): their files are not ours to trust.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.lease_files import LEASE_FOLDER as LEASE_FOLDER
from rldecoder.lease_files import default_lease_folder, holder, make_folder, try_lock

FAKE_DEVICES = "RLDECODER_FAKE_DEVICES"
"""Comma-separated ids of pretended devices, for tests: leased like real ones, computed on CPU."""

MIN_FREE_BYTES = 1 << 30
"""A device with less free memory is taken by a stranger, whether or not it is leased here."""

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class DeviceInfo:
    """One accelerator, as the driver sees it."""

    index: int
    """Position in the driver's list (PCI order)."""
    uuid: str
    """`GPU-...`, or `MIG-...` for a slice; what CUDA_VISIBLE_DEVICES is set to."""
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    utilisation_percent: int | None
    """Share of the last sampling period in which a kernel ran; None where it is not reported."""
    fake: bool = False


class DeviceSeen(BaseModel):
    """What a manifest says of an accelerator: see `DeviceInfo`."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    uuid: str
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    utilisation_percent: int | None


class Machine(BaseModel):
    """Cores and accelerators."""

    model_config = ConfigDict(frozen=True)

    cpu_count: int | None = None
    devices: tuple[DeviceSeen, ...] = ()


@dataclass(frozen=True)
class DeviceLease:
    """Devices that nobody else holds, for as long as the `lease_device` block lasts."""

    device: str
    """What torch calls the first in a process that was started with `env`: `cuda:0` or `cpu`."""
    uuids: tuple[str, ...]
    """Empty on the CPU, which is not leased."""
    name: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables that make a new process see these devices and no other."""
    fds: tuple[int, ...] = ()
    """The locked files, to hand to a child process (`pass_fds`), which then holds the lease too."""


def list_devices() -> list[DeviceInfo]:
    """Accelerators that this process may use; an empty list where there is only a CPU.

    CUDA_VISIBLE_DEVICES is respected, so that a cluster's scheduler has the last word.
    """
    fake = os.environ.get(FAKE_DEVICES)
    if fake is not None:
        return [
            DeviceInfo(i, uuid.strip(), "pretended device", 8 << 30, 8 << 30, 0, fake=True)
            for i, uuid in enumerate(fake.split(","))
            if uuid.strip()
        ]
    return _visible(_nvml_devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _visible(devices: list[DeviceInfo], setting: str | None) -> list[DeviceInfo]:
    """The devices named by CUDA_VISIBLE_DEVICES, in its order (indices or id prefixes)."""
    if setting is None:
        return devices
    chosen: list[DeviceInfo] = []
    for entry in (part.strip() for part in setting.split(",")):
        match = [
            d
            for d in devices
            if (entry.isdigit() and d.index == int(entry))
            or (entry.startswith(("GPU-", "MIG-")) and d.uuid.startswith(entry))
        ]
        if not match:  # CUDA ignores everything after the first entry it cannot resolve
            break
        chosen.extend(d for d in match if d not in chosen)
    return chosen


def _nvml_devices() -> list[DeviceInfo]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: a machine without NVIDIA devices
        return []
    try:
        found: list[DeviceInfo] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            slices = _mig_slices(pynvml, handle)
            found.extend(_describe(pynvml, index, h) for h in slices or [handle])
        return found
    finally:
        pynvml.nvmlShutdown()


def _mig_slices(pynvml: Any, handle: Any) -> list[Any]:
    """Handles of a device's MIG slices; empty when it is used whole."""
    try:
        enabled, _ = pynvml.nvmlDeviceGetMigMode(handle)
        count = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if enabled else 0
    except pynvml.NVMLError:  # the card knows no MIG
        return []
    slices = []
    for i in range(count):
        with contextlib.suppress(pynvml.NVMLError):  # not every slot is filled
            slices.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i))
    return slices


def _describe(pynvml: Any, index: int, handle: Any) -> DeviceInfo:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        utilisation = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:  # MIG slices and some consumer cards do not report it
        utilisation = None
    uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
    return DeviceInfo(
        index, _text(uuid), _text(name), int(memory.total), int(memory.free), utilisation
    )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def snapshot(lister: Callable[[], Sequence[DeviceInfo]] = list_devices) -> Machine:
    """The machine with its devices, for manifests and reports."""
    seen = tuple(DeviceSeen.model_validate(device) for device in lister())
    return Machine(cpu_count=os.cpu_count(), devices=seen)


def device_rows(
    folder: Path | None = None, lister: Callable[[], Sequence[DeviceInfo]] = list_devices
) -> list[tuple[str, str, str, str, str]]:
    """For `rldecoder devices`: id, name, free memory, utilisation, lease; the CPU comes last."""
    folder = folder or default_lease_folder()
    rows = [
        (
            d.uuid,
            d.name,
            f"{_gib(d.memory_free_bytes)} of {_gib(d.memory_total_bytes)}",
            "-" if d.utilisation_percent is None else f"{d.utilisation_percent} %",
            holder(folder, d.uuid) or "free",
        )
        for d in lister()
    ]
    return [*rows, ("cpu", f"{os.cpu_count()} cores", "-", "-", "not leased")]


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


@contextlib.contextmanager
def lease_device(
    wanted: str = "auto",
    folder: Path | None = None,
    *,
    count: int = 1,
    timeout_seconds: float = 3600.0,
    task: str = "",
    say: Callable[[str], None] = lambda message: None,
    lister: Callable[[], Sequence[DeviceInfo]] = list_devices,
) -> Iterator[DeviceLease]:
    """Hold one device, or several, for the length of the block.

    Args:
        wanted: `cpu`; `cuda` for any accelerator; `auto` for any accelerator, or the CPU where
            there is none; or a device's id (`GPU-...`), whole or its unambiguous beginning.
        folder: where the lock files lie; all who are to exclude each other name the same one.
        count: devices held together. They are taken all at once or not at all, so that two who
            want several never wait for each other.
        timeout_seconds: how long to wait while too many candidates are taken.
        task: who holds it, for the messages of those who wait.
        say: receives one line when the CPU is fallen back to, and one when the wait begins.
        lister: gives the devices; tests put their own.

    Raises:
        BadInputError: `wanted` names no device of this machine, or fewer than `count`; or others
            may write to `folder`.
        NoResourceError: too many candidates stayed taken for `timeout_seconds`.
    """
    names = require_devices(wanted, count, say=say, lister=lister)
    if not names:
        yield DeviceLease("cpu", (), "CPU")
        return
    with _holding(names, count, lister, folder, timeout_seconds, task, say) as lease:
        yield lease


def require_devices(
    wanted: str,
    count: int,
    *,
    say: Callable[[str], None] = lambda message: None,
    lister: Callable[[], Sequence[DeviceInfo]] = list_devices,
) -> set[str]:
    """Ids of the devices that `lease_device` would choose from, taken or not; empty: the CPU.

    Raises:
        BadInputError: as `lease_device` does.
    """
    names = _candidates(wanted, lister(), say)
    if names and len(names) < count:
        raise BadInputError(
            f"{count} devices are wanted at once, and {len(names)} would do.",
            f"`device: {wanted}` allows {', '.join(sorted(names))}.",
            "Lower the stage's `processes`, or set device to cuda on a machine with more of them.",
        )
    return names


@contextlib.contextmanager
def lease_assigned(
    ids: Sequence[str],
    folder: Path | None = None,
    *,
    timeout_seconds: float,
    task: str = "",
    lister: Callable[[], Sequence[DeviceInfo]] = list_devices,
) -> Iterator[DeviceLease]:
    """Hold the devices that a cluster's scheduler gave this process, all of them.

    The scheduler knows what it gave out itself, and nothing of runs without it on this machine:
    they and its workers exclude each other by the same lock files.

    Args:
        ids: as in CUDA_VISIBLE_DEVICES.

    Raises:
        BadInputError: they are no devices of this machine.
        NoResourceError: another process held one of them for `timeout_seconds`.
    """
    listed = lister()
    names = {device.uuid for device in _visible(list(listed), ",".join(ids))}
    if not ids or len(names) < len(ids):
        raise BadInputError(
            f"The cluster gave this process the devices {', '.join(ids) or 'none'}.",
            f"Devices here: {', '.join(d.uuid for d in listed) or 'none'}.",
            "Start the cluster's node with the accelerators that the machine has.",
        )
    with _holding(
        names, len(names), lister, folder, timeout_seconds, task, lambda message: None
    ) as lease:
        yield lease


@contextlib.contextmanager
def _holding(
    names: set[str],
    count: int,
    lister: Callable[[], Sequence[DeviceInfo]],
    folder: Path | None,
    timeout_seconds: float,
    task: str,
    say: Callable[[str], None],
) -> Iterator[DeviceLease]:
    """`count` of the named devices, for the length of the block."""
    folder = folder or default_lease_folder()
    make_folder(folder)
    held = _wait(names, count, lister, folder, timeout_seconds, task, say)
    uuids = tuple(device.uuid for device, _ in held)
    try:
        yield DeviceLease(
            device="cpu" if held[0][0].fake else "cuda:0",
            uuids=uuids,
            name=", ".join(device.name for device, _ in held),
            env={"CUDA_VISIBLE_DEVICES": ",".join(uuids)},
            fds=tuple(fd for _, fd in held),
        )
    finally:
        _release(held)


def _candidates(wanted: str, devices: Sequence[DeviceInfo], say: Callable[[str], None]) -> set[str]:
    """Ids of the devices that would do; empty means the CPU."""
    if wanted == "cpu":
        return set()
    if wanted in ("auto", "cuda"):
        missing = _why_unusable(devices)
        if not missing:
            return {d.uuid for d in devices}
        if wanted == "auto":
            say(f"{missing} Running on the CPU.")
            return set()
        raise BadInputError(
            "A CUDA device was asked for and there is none to use.", missing, "Set device to cpu."
        )
    named = {d.uuid for d in devices if d.uuid.startswith(wanted)}
    if len(named) != 1:
        raise BadInputError(
            f"{wanted!r} names {len(named)} devices of this machine.",
            f"Devices here: {', '.join(d.uuid for d in devices) or 'none'}.",
            "Use auto, cpu, cuda, or one id that `rldecoder devices` lists.",
        )
    return named


def _why_unusable(devices: Sequence[DeviceInfo]) -> str:
    """Empty when there is a device that torch can use, else the reason in one sentence."""
    if not devices:
        return "No accelerator was found."
    if devices[0].fake:
        return ""
    import torch  # takes seconds to import, and is not needed elsewhere here

    if torch.version.cuda is None:
        return f"The driver lists {devices[0].name}, but this PyTorch was built without CUDA."
    return ""


def _wait(
    names: set[str],
    count: int,
    lister: Callable[[], Sequence[DeviceInfo]],
    folder: Path,
    timeout_seconds: float,
    task: str,
    say: Callable[[str], None],
) -> list[tuple[DeviceInfo, int]]:
    """`count` devices, with their locked files."""
    deadline, told = time.monotonic() + timeout_seconds, False
    while True:
        # Asked again each time: a stranger's job shows in the free memory, and nowhere else.
        candidates = [d for d in lister() if d.uuid in names]
        taken = _take(candidates, count, folder, task)
        if len(taken) == count:
            return taken
        held = "; ".join(
            f"{d.uuid}: {holder(folder, d.uuid) or 'memory taken by others'}" for d in candidates
        )
        if time.monotonic() >= deadline:
            raise NoResourceError(
                f"{'No device' if count == 1 else f'Not {count} devices'} became free "
                f"within {timeout_seconds:g} s.",
                f"Taken: {held}.",
                "Wait for them, raise the waiting time, or set device to cpu.",
            )
        if not told:
            say(f"Waiting for a device ({held}).")
            told = True
        time.sleep(_POLL_SECONDS)


def _take(
    candidates: Sequence[DeviceInfo], count: int, folder: Path, task: str
) -> list[tuple[DeviceInfo, int]]:
    """Lock `count` of the candidates, those with most free memory first; none if too few."""
    taken: list[tuple[DeviceInfo, int]] = []
    try:
        for device in sorted(candidates, key=lambda d: (-d.memory_free_bytes, d.index)):
            if len(taken) < count and device.memory_free_bytes >= MIN_FREE_BYTES:
                fd = try_lock(folder, device.uuid, task)
                if fd is not None:
                    taken.append((device, fd))
    except BaseException:
        _release(taken)
        raise
    if len(taken) < count:
        _release(taken)
        return []
    return taken


def _release(held: Sequence[tuple[DeviceInfo, int]]) -> None:
    for _, fd in held:
        os.close(fd)  # the lock goes when the last copy is closed: a child may still hold one
